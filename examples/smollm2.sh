#!/usr/bin/env bash
# Trains SmolLM2-135M-Instruct on two CPU ranks. quickstart.sh and tool_use.sh start it.
#   bash examples/smollm2.sh NAME [--seed N] [key=value ...]      NAME: quickstart, for quickstart.yaml
set -euo pipefail
name=$1
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."

overrides=()
while [ $# -gt 0 ]; do
    case "$1" in
        --seed) overrides+=("run.seed=${2:?$name: --seed needs a number}"); shift 2 ;;
        --seed=*) overrides+=("run.seed=${1#--seed=}"); shift ;;
        -h | --help) sed -n '2,4s/^# \{0,1\}//p' "examples/$name.sh"; exit ;;
        *) overrides+=("$1"); shift ;;
    esac
done

source tools/env.sh || exit 1

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false DO_NOT_TRACK=1 PYTHONUNBUFFERED=1
threads=$(($(nproc) / 2))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"

model=models/SmolLM2-135M-Instruct
[ -e "$model" ] || python tools/prepare_smollm2.py "$model"

# The run goes to runs/$name unless run.dir says otherwise. An interrupted run continues from its checkpoint. A finished
# run is renamed after its time.
run="runs/$name"
[ ! -e "$run/summary.json" ] || mv "$run" "$run-$(date -r "$run" +%Y%m%d-%H%M%S)"

# --standalone picks a free port, so two runs can share a machine. With `exec`, Ctrl-C reaches torchrun, which ends its ranks.
exec torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 2 -m megatron_espo train "examples/$name.yaml" \
    ${overrides[@]+"${overrides[@]}"}
