#!/usr/bin/env bash
# The checks that a change must pass: ruff, mypy, then pytest. Arguments go to pytest: `bash tools/test.sh -m "not slow"`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/env.sh || exit 1

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

echo "test: ruff"
python -m ruff check .
echo "test: mypy"
python -m mypy
echo "test: pytest"
python -m pytest "$@"
