#!/usr/bin/env bash
# Trains SmolLM2-135M-Instruct on sums: ESPO on two CPU ranks, rollouts by vLLM. Four to six minutes on two cores.
#   bash examples/quickstart.sh [--seed N] [key=value ...]      e.g. --seed 7 run.steps=4 algorithm.objective=grpo
# The first run also installs the environment (tools/env.sh) and unpacks the model. Nothing is fetched from a model hub.
exec bash "$(dirname "${BASH_SOURCE[0]}")/smollm2.sh" quickstart "$@"
