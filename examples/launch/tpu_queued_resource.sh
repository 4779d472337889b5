#!/usr/bin/env bash
# Trains on a slice of TPUs that is requested as a queued resource:
#
#   ZONE=us-west4-a TYPE=v5litepod-16 examples/launch/tpu_queued_resource.sh NAME SETUP ARGUMENTS...
#   ... my-run 'pip install "dml_jax[tpu]" && mount-my-disk' --config=cars196:ps --workdir=/mnt/runs/ps
#
# SETUP is a command that installs dml_jax and mounts a disk that all hosts share. A run that was asked
# to stop ends with exit code 75 and is started again on the same slice.
set -euo pipefail

name=$1 setup=$2
shift 2
printf -v train '%q ' dml-jax train --distributed "$@"

gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$ZONE" \
  --accelerator-type="$TYPE" --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}" --spot
state=
while [[ $state != ACTIVE ]]; do
  state=$(gcloud compute tpus queued-resources describe "$name" --zone="$ZONE" \
    --format='value(state.state)')
  if [[ $state == FAILED || $state == SUSPENDED ]]; then
    echo "error: the queued resource $name is $state" >&2
    exit 1
  fi
  sleep 30
done

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$name" --zone="$ZONE" --worker=all --command="$1"
}
on_all_hosts "$setup"
code=75
while [[ $code == 75 ]]; do
  code=0
  on_all_hosts "$train" || code=$?
done
exit "$code"
