#!/usr/bin/env bash
# Writes the pinned CPU requirements, with hashes, for every supported Python. Needs `uv` (pip install uv).
# Arguments go to uv: `bash tools/lock.sh --upgrade` takes newer releases.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for version in 3.11 3.12; do
    out="requirements/cpu-py${version/./}.txt"
    echo "lock: $out"
    uv pip compile requirements/cpu.in --override requirements/cpu-overrides.txt --quiet \
        --python-version "$version" --python-platform x86_64-manylinux_2_28 \
        --generate-hashes --no-emit-index-url --no-emit-package megatron-espo \
        --custom-compile-command "bash tools/lock.sh" --output-file "$out" "$@"
done
# Python 3.11 takes Megatron-Core's wheel for 3.12 (tools/env.sh says why).
sed -n '/^megatron-core==/,/^    # via/p' requirements/cpu-py312.txt >requirements/megatron-core-py311.txt
if grep -nE '^(nvidia-|cuda-|torch|apex|-)|://|(^|[ =@])/' requirements/*-py*.txt; then
    echo "lock: the lines above must not be in a pinned file (CUDA package, torch, address or path of one machine)" >&2
    exit 1
fi
