"""``megatron-espo plan``: arguments and execution. Imports torch only when it runs."""

import argparse
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_espo.errors import InputError

DESCRIPTION = """\
Print what a run will need and transfer, from its configuration and the model's config.json alone:
no weights, no tokenizer, no GPU. Exit code 0: the run fits; 1: it does not, and the plan says what
to change.
"""
UNITS = {"": 10**9, "GB": 10**9, "GiB": 2**30}
# Option, type, default, help.
NUMBERS: tuple[tuple[str, type, float | None, str], ...] = (
    ("gpus", int, None, "trainer's GPUs (ranks); default: the fewest for the layout"),
    ("gpus-per-node", int, 8, "GPUs joined by --link-gbps (%(default)s)"),
    ("link-gbps", float, 3600, "Gbit/s and direction inside a node (%(default)g: NVLink 4)"),
    ("network-gbps", float, 400, "Gbit/s for each GPU between nodes (%(default)g: InfiniBand NDR)"),
    (
        "host-gbps", float, 400,
        "Gbit/s and direction between GPU and host (%(default)g: PCIe 5 x16; NVLink-C2C: 3600)",
    ),
    (
        "expected-tokens", int, None,
        "mean tokens of a prompt with its response; default: half of rollout.max_response_tokens",
    ),
)  # fmt: skip


def add_parser(commands: Any, add_config: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add the subcommand. ``add_config`` adds the arguments that name the run's settings."""
    summary = "what a run will need and transfer, without GPUs"
    parser = commands.add_parser("plan", help=summary, description=DESCRIPTION)
    add_config(parser)
    for name, kind, default, text in NUMBERS:
        metavar = "N" if kind is int else "GBIT"
        parser.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=text)
    memory = "of one GPU, in GB (10^9 bytes) or GiB (%(default)s)"
    parser.add_argument("--gpu-memory", default="80GB", metavar="SIZE", help=memory)
    parser.add_argument("--json", metavar="FILE", help="write the whole plan as JSON")


def run(args: argparse.Namespace) -> int:
    """Plan and print; 0 where the run fits, else 1. InputError: wrong arguments or settings."""
    for name, *_ in NUMBERS:
        value = getattr(args, name.replace("-", "_"))
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"--{name}: expected a number above 0, got {value:g}")
    gpu_memory = _bytes(args.gpu_memory)
    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise InputError(f"--json: expected a file in a folder that exists, got {args.json!r}")
    from megatron_espo.config import load_config
    from megatron_espo.config.checks import check_model, read_hf_config

    config = load_config(args.config, args.overrides)
    hf_config = check_model(config, read_hf_config(config))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # use no GPU, even where there is one
    from megatron_espo.tools.plan.planner import Builder, Links, Machine, find_fixes, make_plan
    from megatron_espo.tools.plan.render import print_plan

    link, network, host = (
        gbit * 1e9 / 8 for gbit in (args.link_gbps, args.network_gbps, args.host_gbps)
    )
    links = Links(link, network, args.gpus_per_node)
    machine = Machine(gpu_memory, links, args.expected_tokens, host_link=host)
    build = Builder(hf_config, machine)
    plan = make_plan(config, build, args.gpus)
    fixes = [] if plan.fits else find_fixes(config, build, plan, args.gpus)
    if args.json:
        Path(args.json).write_text(
            json.dumps(plan.to_json() | {"fixes": fixes}) + "\n", encoding="utf-8"
        )
    print_plan(plan, fixes)
    return 0 if plan.fits else 1


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *(GB|GiB|)", text)
    size = float(match[1]) * UNITS[match[2]] if match else 0
    if not size:
        raise InputError(f'--gpu-memory: expected a size like "80GB" or "79.6GiB", got "{text}"')
    return int(size)
