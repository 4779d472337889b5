#!/usr/bin/env bash
# Trains on several machines with SLURM, and continues after preemptions and time limits:
#
#   sbatch --nodes=2 --gpus-per-node=8 examples/launch/slurm.sh --config=cars196:ps --workdir=runs/ps
#
# One process a machine uses all of its GPUs. Two minutes before the time limit, SLURM asks the run to
# stop; it saves a checkpoint and ends with exit code 75, and the job queues again. Any other failure
# ends the job. The folder of the run must be on a disk that all machines share.
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

srun --kill-on-bad-exit=0 dml-jax train --distributed "$@"
code=$?
if [[ $code == 75 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
