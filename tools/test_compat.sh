#!/usr/bin/env bash
# The core tests (no engine) against several Megatron-Core releases: source tools/env.sh; bash tools/test_compat.sh [VERSION ...]
# A release is downloaded without its dependencies, also where it asks for a newer Python than this one, unpacked under
# build/compat and put before the installed one; the environment stays as it is. COMPAT_TESTS="tests/..." runs other tests.
# Prints a row of docs/compatibility.md for each; exit code 1 if a test failed. Logs: build/compat/<version>.log
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
versions=("$@")
[ $# -gt 0 ] || versions=(0.16.1 0.17.1 0.18.2 0.19.2)
# shellcheck disable=SC2206 # words
tests=(${COMPAT_TESTS:-tests/test_existing_script.py tests/test_parity.py tests/test_step.py tests/test_router_replay.py tests/test_weights_model.py
    tests/test_plan.py tests/test_checkpoint.py tests/test_resume.py})
folder=$PWD/build/compat
failed=0
for version in "${versions[@]}"; do
    release=$folder/$version
    if [ ! -d "$release/megatron" ]; then
        python -m pip download -qq --no-deps --only-binary :all: --ignore-requires-python --dest "$folder/wheels-$version" \
            "megatron-core==$version" || { echo "| $version | not to be had |"; failed=1; continue; }
        python -m zipfile -e "$folder/wheels-$version"/*.whl "$release"
    fi
    PYTHONPATH=$release:$PWD python -m pytest -q -p no:cacheprovider -m "not slow" "${tests[@]}" >"$release.log" 2>&1 || failed=1
    echo "| $version | $(tail -n 1 "$release.log" | tr -d =) |"
done
exit $failed
