"""``megatron-espo plan``: its arguments, and the run of it. Imports torch only when it runs."""

import argparse
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_espo.errors import InputError

DESCRIPTION = """\
Print what a run will need and move, from its configuration and the model's config.json alone: no weights, no tokenizer,
no GPU. Exit code 0: it fits; 1: it does not, and the plan says what to change.
"""
UNITS = {"": 10**9, "GB": 10**9, "GiB": 2**30}


def add_parser(commands: Any, add_config: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add the subcommand. ``add_config`` adds the arguments that name the run's settings."""
    parser = commands.add_parser(
        "plan", help="what a run will need and move, without GPUs", description=DESCRIPTION
    )
    add_config(parser)
    parser.add_argument("--gpus", type=int, metavar="N", help="trainer's GPUs (ranks); default: the fewest for the layout")
    parser.add_argument(
        "--gpu-memory", default="80GB", metavar="SIZE", help="of one GPU, in GB (10^9 bytes) or GiB (%(default)s)"
    )
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs joined by --link-gbps (%(default)s)")
    parser.add_argument(
        "--link-gbps", type=float, default=3600, metavar="GBIT",
        help="gigabits a second and direction between GPUs of a node (%(default)g: NVLink 4, 450 GB/s)",
    )  # fmt: skip
    parser.add_argument(
        "--network-gbps", type=float, default=400, metavar="GBIT",
        help="gigabits a second for each GPU between nodes (%(default)g: InfiniBand NDR, 50 GB/s)",
    )  # fmt: skip
    parser.add_argument(
        "--host-gbps", type=float, default=400, metavar="GBIT",
        help="gigabits a second and direction between a GPU and host memory (%(default)g: PCIe 5 x16, 50 GB/s; NVLink-C2C: 3600)",
    )  # fmt: skip
    parser.add_argument(
        "--expected-tokens", type=int, metavar="N",
        help="mean tokens of a prompt with its response; default: half of rollout.max_response_tokens",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Plan and print; 0 where the run fits, 1 where it does not. InputError: mistakes in the arguments or settings."""
    for name in ("gpus", "gpus_per_node", "link_gbps", "network_gbps", "host_gbps", "expected_tokens"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"--{name.replace('_', '-')}: expected a number above 0, got {value:g}")
    gpu_memory = _bytes(args.gpu_memory)
    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise InputError(f"--json: expected a file in a folder that exists, got {args.json!r}")
    from megatron_espo.config import load_config
    from megatron_espo.config.placement import read_hf_config

    config = load_config(args.config, args.overrides)
    hf_config = config.validate_model(read_hf_config(config))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a plan touches no GPU, also where there is one
    from megatron_espo.plan.advice import find_fixes
    from megatron_espo.plan.make import Builder, Links, Machine, make_plan
    from megatron_espo.plan.render import print_plan

    links = Links(args.link_gbps * 1e9 / 8, args.network_gbps * 1e9 / 8, args.gpus_per_node)
    build = Builder(hf_config, Machine(gpu_memory, links, args.expected_tokens, host_link=args.host_gbps * 1e9 / 8))
    plan = make_plan(config, build, args.gpus)
    fixes = [] if plan.fits else find_fixes(config, build, plan, args.gpus)
    if args.json:
        Path(args.json).write_text(json.dumps(plan.to_json() | {"fixes": fixes}) + "\n")
    print_plan(plan, fixes)
    return 0 if plan.fits else 1


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *(GB|GiB|)", text)
    size = float(match[1]) * UNITS[match[2]] if match else 0
    if not size:
        raise InputError(f'--gpu-memory: expected a size like "80GB" or "79.6GiB", got "{text}"')
    return int(size)
