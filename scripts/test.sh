#!/usr/bin/env bash
# Lint, format, types and tests, in an environment of their own (.venv-test).
#
#   scripts/test.sh [--all] [PYTEST ARGUMENTS]       PYTHON=/path/to/python chooses the Python
#
# Without --all, tests that are marked slow are left out.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

prepare_environment .venv-test cpu,demo,mlflow,test,wandb
python="$PWD/.venv-test/bin/python"

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy dml_jax benchmarks configs scripts
if [[ "${1:-}" == --all ]]; then
  shift
else
  set -- -m "not slow" "$@"
fi
exec "$python" -m pytest "$@"
