#!/usr/bin/env bash
# Runs the checks that a change must pass: ruff format, ruff check, mypy, then pytest.
#   bash tools/test.sh          the fast suite (pytest -m "not slow")
#   bash tools/test.sh --all    the slow tests too
# Further arguments go to pytest: `bash tools/test.sh tests/test_segments.py -k quantile`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

select=(-m "not slow")
if [ "${1:-}" = --all ]; then
    select=()
    shift
fi
source tools/env.sh || exit 1

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

echo "test: ruff"
python -m ruff format --check .
python -m ruff check .
echo "test: mypy"
python -m mypy
echo "test: pytest"
# Most tests wait for processes that they start, so three fit on two cores. A file stays in one process, because its
# tests share engines and runs.
python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=25 ${select[@]+"${select[@]}"} "$@"
