#!/usr/bin/env bash
''':'  # Bash runs this half. torchrun starts Python with the same file, for which this half is one string.
# ESPO on Llama-3-70B (default) or Qwen2.5-72B, with the settings of examples/*_8nodes.yaml, or *_16nodes.yaml for 128 ranks:
#   torchrun --nnodes 8 --nproc-per-node 8 ... examples/run_espo_70b.sh [options] [section.key=value ...]
#   srun --ntasks-per-node 1 bash examples/run_espo_70b.sh ...      ranks and rendezvous from Slurm (examples/slurm/)
#   bash examples/run_espo_70b.sh ...                               this node's GPUs; `torchrun` without flags does the same
#   bash examples/run_espo_70b.sh --rehearse                        the same run, tiny, on four CPU ranks
# Environment: NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, NPROC_PER_NODE; ESPO_MODEL for --model.
set -euo pipefail
fail() { echo "run_espo_70b: $*" >&2; exit 2; }

nodes="${NNODES:-${SLURM_STEP_NUM_NODES:-1}}" # nodes of the step: without srun there is one launcher
[ "${SLURM_STEP_NUM_TASKS:-$nodes}" = "$nodes" ] || fail "torchrun starts the ranks of a node: srun --ntasks-per-node 1"

ranks="${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}"
case " $* " in
    *" --help "* | *" -h "*) ranks=1 ;;
    *" --rehearse "*)
        ranks="${NPROC_PER_NODE:-$((nodes < 4 ? 4 / nodes : 1))}"
        [ -n "${NPROC_PER_NODE:-}" ] || [ $((nodes * ranks % 4)) = 0 ] || fail "--rehearse: expected 1, 2 or a multiple of 4 nodes, got $nodes"
        ;;
esac
[ -n "$ranks" ] || ranks=$(nvidia-smi -L 2>/dev/null | grep -c ^GPU) || fail "no GPU found: set NPROC_PER_NODE, or try --rehearse"

place=(--standalone --local-addr 127.0.0.1) # finds a free port; the host name may not resolve
if [ "$nodes" -gt 1 ]; then
    : "${NODE_RANK:=${SLURM_NODEID:?run_espo_70b: with NNODES above 1, give each node its NODE_RANK}}"
    : "${MASTER_ADDR:=$(scontrol show hostnames "${SLURM_STEP_NODELIST:?run_espo_70b: MASTER_ADDR is not set}" | sed -n 1p)}"
    : "${MASTER_PORT:=$((20000 + ${SLURM_JOB_ID:-9500} % 10000))}" # two jobs may share a node
    place=(--nnodes "$nodes" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
fi
export ESPO_LAUNCHED=1
exec torchrun "${place[@]}" --nproc-per-node "$ranks" "${BASH_SOURCE[0]}" "$@"

: <<'# end of the Python half'
'''
import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from megatron_espo.cli import main  # of this folder, installed or not


def run() -> int:
    """Choose the settings and train."""
    if os.environ["WORLD_SIZE"] == "1" and "ESPO_LAUNCHED" not in os.environ:
        # `torchrun` without flags: restart through bash, without the variables of this torchrun.
        drop = ("MASTER_", "TORCHELASTIC_", "RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
        os.execvpe("bash", ["bash", __file__, *sys.argv[1:]], clean)
    # Megatron-Core overlaps tensor-parallel communication with computation only with one work queue.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    args = parse()
    if args.preflight:
        return main(["doctor", "--cluster", "--folder", args.preflight])
    nodes = 16 if int(os.environ["WORLD_SIZE"]) >= 128 else 8
    config = args.config or str(HERE / f"{args.model}_{nodes}nodes.yaml")
    smaller = []
    if args.rehearse:
        from examples.rehearsal import prepare

        smaller = prepare(config)
    return main(["train", config, *smaller, *args.overrides])


def parse() -> argparse.Namespace:
    """The options in the comment above."""
    text = "".join(line[2:] for line in __doc__.splitlines(keepends=True) if line.startswith("# "))
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["llama3_70b", "qwen2.5_72b"]
    parser.add_argument("--model", choices=models, default=os.environ.get("ESPO_MODEL", models[0]))
    parser.add_argument("--config", help="other settings, such as examples/qwen3_14b_1node.yaml")
    parser.add_argument("--rehearse", action="store_true", help="a tiny Llama of the same shape, on CPUs")
    parser.add_argument("--preflight", metavar="FOLDER", help="only check the nodes, and this folder that they share")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(run())
# end of the Python half
