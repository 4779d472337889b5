#!/usr/bin/env bash
# Lint, format, types and tests, in an environment of their own (.venv-test).
#
#   scripts/test.sh [PYTEST ARGUMENTS]       PYTHON=/path/to/python chooses the Python
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

prepare_environment .venv-test cpu,demo,test,wandb
python="$PWD/.venv-test/bin/python"

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy dml_jax scripts configs
exec "$python" -m pytest "$@"
