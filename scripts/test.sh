#!/usr/bin/env bash
# Runs lint, format, types, import layers and tests, in an environment of their own (.venv-test).
#
#   scripts/test.sh [--all] [PYTEST ARGUMENTS]       PYTHON=/path/to/python selects the Python
#
# Without --all, tests marked slow are skipped.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

prepare_environment .venv-test cpu,demo,docs,lancedb,metrics,mlflow,pgvector,prepare,qdrant,report,storage,study,tables,test,tpu,wandb
python="$PWD/.venv-test/bin/python"

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy dml_jax benchmarks configs scripts
"$PWD/.venv-test/bin/lint-imports"
if [[ "${1:-}" == --all ]]; then
  shift
else
  set -- -m "not slow" "$@"
fi
exec "$python" -m pytest "$@"
