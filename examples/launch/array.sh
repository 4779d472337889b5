#!/usr/bin/env bash
# Trains the cells of a comparison, `dml-jax paper` or `dml-jax sweep`, as an array of SLURM jobs, one
# run and one GPU each, and continues after preemptions and time limits:
#
#   cells=$(dml-jax paper readme --root=runs/papers --list)
#   sbatch --array=0-$((cells - 1)) --gpus=1 examples/launch/array.sh paper readme --root=runs/papers
#   dml-jax paper readme --root=runs/papers --print
#
# Give all three the same selection (--datasets, --losses, --methods, --seeds; --over) and settings.
# Two minutes before the time limit, SLURM asks the run to stop; it saves a checkpoint and ends with
# exit code 75, and its job queues again. The runs must be on a disk that all machines share, or at a
# URL.
#SBATCH --ntasks=1
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

srun dml-jax "$1" --array "${@:2}"
code=$?
if [[ $code == 75 ]]; then
  # SLURM_JOB_ID of one job of the array is that of the whole array.
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
