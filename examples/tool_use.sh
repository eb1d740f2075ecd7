#!/usr/bin/env bash
# Trains SmolLM2-135M-Instruct to call a calculator: ESPO over two turns, on two CPU ranks. About seven minutes on two cores.
#   bash examples/tool_use.sh [--seed N] [key=value ...]      e.g. --seed 7 run.steps=4
# The first run also installs the environment (tools/env.sh) and unpacks the model. Nothing is fetched from a model hub.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

overrides=()
while [ $# -gt 0 ]; do
    case "$1" in
        --seed) overrides+=("run.seed=${2:?tool_use: --seed needs a number}"); shift 2 ;;
        --seed=*) overrides+=("run.seed=${1#--seed=}"); shift ;;
        -h | --help) sed -n '2,4s/^# \{0,1\}//p' examples/tool_use.sh; exit ;;
        *) overrides+=("$1"); shift ;;
    esac
done

source tools/env.sh || exit 1

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false DO_NOT_TRACK=1 PYTHONUNBUFFERED=1
threads=$(($(nproc) / 2))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"

model=models/SmolLM2-135M-Instruct
[ -e "$model" ] || python tools/prepare_smollm2.py "$model"

# The run goes to runs/tool_use, unless run.dir says otherwise. One that was cut short goes on from its checkpoint; a
# finished one is kept under its time.
[ ! -e runs/tool_use/summary.json ] || mv runs/tool_use "runs/tool_use-$(date -r runs/tool_use +%Y%m%d-%H%M%S)"

# --standalone picks a free port, so two runs can share a machine. `exec` leaves no shell between Ctrl-C and torchrun,
# which ends its ranks.
exec torchrun --standalone --nproc-per-node 2 -m megatron_espo.cli train examples/tool_use.yaml \
    ${overrides[@]+"${overrides[@]}"}
