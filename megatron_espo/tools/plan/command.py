"""``megatron-espo plan``: arguments and execution. Imports torch only when it runs."""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_espo.errors import InputError

# Option, type, default, help.
NUMBERS: tuple[tuple[str, type, float | None, str], ...] = (
    ("gpus", int, None, "trainer's GPUs (ranks); default: the fewest for the layout"),
    ("gpus-per-node", int, 8, "GPUs joined by --link-gbps (%(default)s)"),
    ("gpu-memory", float, 80, "of one GPU, in GB of 10^9 bytes (%(default)g)"),
    ("link-gbps", float, 3600, "Gbit/s and direction inside a node (%(default)g: NVLink 4)"),
    ("network-gbps", float, 400, "Gbit/s for each GPU between nodes (%(default)g: InfiniBand NDR)"),
    ("host-gbps", float, 400, "Gbit/s and direction to the host (%(default)g: PCIe 5 x16)"),
    ("expected-tokens", int, None, "of prompt and response; default: max_response_tokens / 2"),
)


def add_options(option: Callable[..., Any]) -> None:
    """Add the options with a parser's ``add_argument``."""
    for name, kind, default, text in NUMBERS:
        option(f"--{name}", type=kind, default=default, metavar="N", help=text)
    option("--json", metavar="FILE", help="write the whole plan as JSON")


def run(args: argparse.Namespace) -> int:
    """Plan and print; 0 where the run fits, else 1. InputError: wrong arguments or settings."""
    for name, *_ in NUMBERS:
        value = getattr(args, name.replace("-", "_"))
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"--{name}: expected a number above 0, got {value:g}")
    out = Path(args.json or "").resolve()
    if args.json and (out.is_dir() or not out.parent.is_dir()):
        raise InputError(f"--json: expected a file in a folder that exists, got {args.json!r}")
    from megatron_espo.config import load_config
    from megatron_espo.config.checks import check_model, read_model

    config = load_config(args.config, args.overrides)
    spec = check_model(config, read_model(config))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # use no GPU, even where there is one
    from megatron_espo.algo import load_objective
    from megatron_espo.tools.plan.planner import Builder, Machine, find_fix, make_plan
    from megatron_espo.tools.plan.render import render

    load_objective(config.algorithm, max_response_tokens=config.rollout.max_response_tokens)
    machine = Machine(
        gpu_memory=int(args.gpu_memory * 1e9),
        gpus_per_node=args.gpus_per_node,
        node_link=args.link_gbps * 1e9 / 8,
        network=args.network_gbps * 1e9 / 8,
        host_link=args.host_gbps * 1e9 / 8,
        expected_tokens=args.expected_tokens,
    )
    build = Builder(spec)
    plan = make_plan(config, build, machine, args.gpus)
    fix = find_fix(args, build, machine, plan) if plan.problems else None
    print(render(plan, fix))
    if args.json:
        content = asdict(plan) | {"fits": not plan.problems, "fix": fix}
        Path(args.json).write_text(json.dumps(content) + "\n", encoding="utf-8")
    return int(bool(plan.problems))
