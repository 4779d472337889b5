#!/usr/bin/env bash
# Installs into .venv, trains four variants on the built-in letters and prints a comparison.
#
#   scripts/quickstart.sh [ARGUMENTS OF dml-jax quickstart]       PYTHON=/path/to/python selects the Python
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

accelerator=cpu
if [[ "$(nvidia-smi -L 2> /dev/null || true)" == *GPU* ]]; then
  accelerator=cuda
fi
prepare_environment .venv "$accelerator,demo,report"
exec "$PWD/.venv/bin/python" -m dml_jax quickstart "$@"
