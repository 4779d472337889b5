#!/usr/bin/env bash
# Trains an embedding four ways on the embedded letters and prints how they compare.
#
#   scripts/quickstart.sh [ARGUMENTS OF quickstart.py]       PYTHON=/path/to/python chooses the Python
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

accelerator=cpu
if [[ "$(nvidia-smi -L 2> /dev/null || true)" == *GPU* ]]; then
  accelerator=cuda
fi
prepare_environment .venv "$accelerator,demo"
exec "$PWD/.venv/bin/python" -m dml_jax quickstart "$@"
