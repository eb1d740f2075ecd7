"""The ``megatron-espo`` command. Everything a user can get wrong is told before torch, Megatron-Core or vLLM loads."""

import argparse
import logging
import os
import sys
import warnings
from typing import Any

from megatron_espo.errors import InputError
from megatron_espo.parity import cases
from megatron_espo.plan import command as plan

SERVE_EXAMPLES = """\
on each engine's machine:  CUDA_VISIBLE_DEVICES=0,1,2,3 megatron-espo serve runs/mine --listen 10.0.0.5:7700
on the trainer's:          torchrun ... -m megatron_espo train run.yaml run.dir=runs/mine 'rollout.hosts=["10.0.0.5:7700"]'
exit codes:                0 the run is over, or SIGTERM; 1 no owner and no heartbeat of the run for --idle seconds
"""
PARITY_EXAMPLES = """\
this machine:    megatron-espo parity
a cluster:       srun torchrun ... -m megatron_espo parity --folder /shared/parity run.yaml --num-layers 4
"""
TRAIN_EXAMPLES = """\
one process:     megatron-espo train run.yaml optimizer.lr=2e-6
several ranks:   torchrun --nproc-per-node 8 -m megatron_espo train run.yaml megatron.tensor_model_parallel_size=2
"""
EVAL_EXAMPLES = """\
greedy:          megatron-espo eval run.yaml eval.prompts=math500.jsonl eval.samples=1 eval.temperature=0
after a run:     megatron-espo eval run.yaml model.path=runs/mine/hf eval.samples=16
"""


class _ReferenceHelp(argparse.Action):
    """``--help`` with every setting; a late import, so that ``doctor`` runs where pydantic is missing."""

    def __init__(self, option_strings: list[str], dest: str, **_: Any):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="show every setting and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from megatron_espo.config import render_reference

        print(f"{parser.format_help()}\n{render_reference()}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    parser = argparse.ArgumentParser("megatron-espo", description="RL post-training on Megatron-Core and vLLM.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,serve,plan,eval,report,convert,parity,doctor}")

    train = commands.add_parser(
        "train",
        help="train a model (also under torchrun)",
        description="Train a model with the settings of a YAML file.",
        epilog=TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    train.add_argument("-h", "--help", action=_ReferenceHelp)
    _add_config(train)

    _add_serve(commands)
    plan.add_parser(commands, _add_config)
    _add_run_views(commands)

    convert = commands.add_parser("convert", help="Hugging Face weights to a Megatron checkpoint, or back")
    directions = convert.add_subparsers(dest="direction", required=True, metavar="{to-megatron,to-hf}")
    to_megatron = directions.add_parser("to-megatron", help="write model.path as a Megatron checkpoint")
    to_hf = directions.add_parser("to-hf", help="write a Megatron checkpoint as a Hugging Face folder")
    for direction in (to_megatron, to_hf):
        direction.add_argument("config", metavar="CONFIG.yaml", help="settings; model and megatron are used")
        if direction is to_hf:
            direction.add_argument("checkpoint", metavar="CHECKPOINT", help="Megatron checkpoint folder to read")
        direction.add_argument("out", metavar="OUT", help="folder to write")
        _add_overrides(direction)

    _add_parity(commands)

    doctor = commands.add_parser("doctor", help="what works on this machine, and what to do about the rest")
    doctor.add_argument("--timeout", type=float, default=180.0, help="seconds for one package to import (%(default)g)")
    doctor.add_argument(
        "--cluster", action="store_true", help="check the nodes of a run together; start it on every rank (torchrun)"
    )
    doctor.add_argument("--folder", default=".", help="with --cluster: folder that all nodes share (%(default)s)")
    return parser


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="keep a vLLM server running for a run whose trainer is on other machines",
        description="Keep vLLM's server running on this machine for the run in RUN_DIR, whose rollout.hosts names this machine.",
        epilog=SERVE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument("run", metavar="RUN_DIR", help="the run's folder, on a file system that all machines share")
    serve.add_argument("--listen", metavar="HOST:PORT", help="address of this machine; default: its host name, port 7700")
    serve.add_argument(
        "--idle",
        type=float,
        default=3600.0,
        metavar="SECONDS",
        help="end after so long without an owner and without a heartbeat of the run (%(default)g)",
    )
    serve.add_argument("--print", action="store_true", help="print the server's command and exit")


def _add_run_views(commands: Any) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="avg@k and pass@k of a model on held-out prompts",
        description="Sample and judge eval.prompts (data.prompts where there are none) with the weights of model.path; no Megatron needed.",
        epilog=EVAL_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_config(evaluate)
    evaluate.add_argument("--out", metavar="FILE.json", help="default: eval.json in run.dir")
    report = commands.add_parser("report", help="one HTML page about one or several runs", description="Write one self-contained HTML page.")
    report.add_argument("runs", metavar="RUN", nargs="+", help="run folders")
    report.add_argument("--out", metavar="PAGE.html", help="default: RUN/report.html, or comparison.html beside the first of several")


def _add_parity(commands: Any) -> None:
    parity = commands.add_parser(
        "parity",
        help="compare every parallel layout's gradient with one rank's",
        description="Run one recorded batch through every parallel layout that the ranks allow; compare loss, gradient norm and each "
        "tensor's gradient with one rank's. Exit code 1 if one differs.",
        epilog=PARITY_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parity.add_argument
    add("config", metavar="CONFIG.yaml", nargs="?", help="compare this run's model; default: two tiny random ones")
    _add_overrides(parity)
    add("--short", action="store_true", help="a small part of the matrix, for tests")
    add("--layouts", help=f"comma-separated, of: {', '.join(layout.name for layout in cases.LAYOUTS)}")
    add("--micro-batches", help=f"comma-separated, of: {', '.join(cases.MICRO_BATCHES)}")
    add("--objectives", help=f"comma-separated, of: {', '.join(cases.OBJECTIVES)}")
    add("--ranks", type=int, default=4, help="without torchrun: start at most so many ranks (%(default)s)")
    add("--tolerance", type=float, default=1e-4, help="largest relative difference (%(default)s)")
    add("--num-layers", type=int, help="keep so many of the model's layers, so that it fits one rank")
    add("--folder", help="keep batch and reference there; default: a temporary folder")
    add("--record", action="store_true", help="only write batch and reference, on one rank, into --folder")


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="the run's settings")
    _add_overrides(parser)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="settings that win over the file's")


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit code: 0 done, 1 doctor's no, 2 a user's mistake, 130 interrupted."""
    args = _parse(build_parser(), argv)
    checked = False
    try:
        if args.command == "doctor":
            if args.cluster:
                from megatron_espo import preflight

                return preflight.main(args.folder, args.timeout)
            from megatron_espo import doctor

            return doctor.main(args.timeout)
        if args.command == "parity":
            from megatron_espo.parity import command

            request = command.make_request(args)
            _silence_dependencies()
            return command.main(request)
        if args.command == "plan":
            _silence_dependencies()
            return plan.run(args)
        if args.command == "serve":
            _silence_dependencies()
            from megatron_espo.rollout import keeper

            return keeper.main(args.run, args.listen, args.idle, args.print)
        if args.command == "report":
            from megatron_espo.report.page import write_report

            print(f"report: {write_report(args.runs, args.out)}")
            return 0
        config = _checked_config(args)
        checked = True
        _work(args, config)
        return 0
    except InputError as error:
        _report(error, checked)
        return 2
    except KeyboardInterrupt:
        return 130


def _parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """argparse takes positional arguments in one piece only; overrides may also follow options."""
    args, rest = parser.parse_known_args(argv)
    wrong = [word for word in rest if word.startswith("-") or "=" not in word]
    if wrong or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(wrong or rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _checked_config(args: argparse.Namespace) -> Any:
    from megatron_espo.config import load_config

    config = load_config(args.config, args.overrides)
    if args.command != "eval":  # which has no ranks
        config.validate_for(int(os.environ.get("WORLD_SIZE", "1")))
    hf_config = config.validate_model()
    if args.command == "train":
        config.validate_router(hf_config)
    if args.command in ("train", "eval"):
        config.validate_paths()
        if os.environ.get("LOCAL_RANK", "0") == "0":
            from megatron_espo.data.sources import read_rows

            # A bad row ends the run here.
            read_rows(config.data.prompts, config.data.task_args, config.run.seed)
            if config.eval.prompts:
                read_rows(config.eval.prompts, config.eval.task_args, config.run.seed)
    return config


def _silence_dependencies() -> None:
    """Megatron, torch and vLLM tell every rank what is absent or deprecated; ``doctor`` tells it once."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    for name in ("vllm", "megatron"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed|megatron_espo\.mcore\.cpu")


def _work(args: argparse.Namespace, config: Any) -> None:
    _silence_dependencies()
    if args.command == "train":
        from megatron_espo.trainer import train

        train(config)
    elif args.command == "eval":
        from megatron_espo.evaluator import evaluate_model

        evaluate_model(config, args.out)
    elif args.direction == "to-megatron":
        from megatron_espo.mcore.convert import hf_to_megatron

        hf_to_megatron(config, args.out)
    else:
        from megatron_espo.mcore.convert import megatron_to_hf

        megatron_to_hf(config, args.checkpoint, args.out)


def _report(error: InputError, checked: bool) -> None:
    """Print the error once: on rank 0; on another rank only what rank 0 may not have seen.

    The checks before the work come out alike on all ranks of a node; during the work an error may concern one rank.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    elif checked or os.environ.get("LOCAL_RANK") == "0":
        print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
