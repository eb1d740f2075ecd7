#!/usr/bin/env bash
# Trains SmolLM2-135M-Instruct on sums: ESPO on two CPU ranks, rollouts by vLLM. About four minutes on two cores.
#   bash examples/quickstart.sh [--seed N] [key=value ...]      e.g. --seed 7 run.steps=4 algorithm.objective=grpo
# The first run also installs the environment (tools/env.sh) and unpacks the model. Nothing is fetched from a model hub.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

overrides=()
while [ $# -gt 0 ]; do
    case "$1" in
        --seed) overrides+=("run.seed=${2:?quickstart: --seed needs a number}"); shift 2 ;;
        --seed=*) overrides+=("run.seed=${1#--seed=}"); shift ;;
        -h | --help) sed -n '2,4s/^# \{0,1\}//p' examples/quickstart.sh; exit ;;
        *) overrides+=("$1"); shift ;;
    esac
done

source tools/env.sh || exit 1

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false DO_NOT_TRACK=1 PYTHONUNBUFFERED=1
threads=$(($(nproc) / 2))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"

model=models/SmolLM2-135M-Instruct
[ -e "$model" ] || python tools/prepare_smollm2.py "$model"

# The run goes to runs/quickstart, unless run.dir says otherwise. One that was cut short goes on from its checkpoint; a
# finished one is kept under its time.
[ ! -e runs/quickstart/summary.json ] || mv runs/quickstart "runs/quickstart-$(date -r runs/quickstart +%Y%m%d-%H%M%S)"

# --standalone picks a free port, so two runs can share a machine. `exec` leaves no shell between Ctrl-C and torchrun,
# which ends its ranks.
exec torchrun --standalone --nproc-per-node 2 -m megatron_espo.cli train examples/quickstart.yaml \
    ${overrides[@]+"${overrides[@]}"}
