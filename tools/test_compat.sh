#!/usr/bin/env bash
# The core tests (no engine) against other Megatron-Core releases: source tools/env.sh; bash tools/test_compat.sh VERSION ...
# Each release is downloaded without its dependencies, whatever Python it needs, unpacked under build/compat and put first on
# PYTHONPATH; the environment does not change. COMPAT_TESTS="tests/..." runs other tests.
# Prints a row for each release; exit code 1 if a test failed. Logs: build/compat/<version>.log
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# shellcheck disable=SC2206 # words
tests=(${COMPAT_TESTS:-tests/test_existing_script.py tests/test_parity.py tests/test_step.py tests/test_router_replay.py tests/test_weights_model.py
    tests/test_plan.py tests/test_checkpoint.py tests/test_resume.py})
folder=$PWD/build/compat
failed=0
for version in "${@:?expected a release, such as 0.20.0}"; do
    release=$folder/$version
    if [ ! -d "$release/megatron" ]; then
        python -m pip download -qq --no-deps --only-binary :all: --ignore-requires-python --dest "$folder/wheels-$version" \
            "megatron-core==$version" || { echo "| $version | not found |"; failed=1; continue; }
        python -m zipfile -e "$folder/wheels-$version"/*.whl "$release"
    fi
    PYTHONPATH=$release:$PWD python -m pytest -q -p no:cacheprovider -m "not slow" "${tests[@]}" >"$release.log" 2>&1 || failed=1
    echo "| $version | $(tail -n 1 "$release.log" | tr -d =) |"
done
exit $failed
