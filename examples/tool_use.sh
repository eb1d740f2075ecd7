#!/usr/bin/env bash
# Trains SmolLM2-135M-Instruct to call a calculator: ESPO over two turns, on two CPU ranks. About seven minutes on two cores.
#   bash examples/tool_use.sh [--seed N] [key=value ...]      e.g. --seed 7 run.steps=4
# The first run also installs the environment (tools/env.sh) and unpacks the model. Nothing is fetched from a model hub.
exec bash "$(dirname "${BASH_SOURCE[0]}")/smollm2.sh" tool_use "$@"
