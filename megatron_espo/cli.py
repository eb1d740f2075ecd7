"""The ``megatron-espo`` command. Settings are checked before torch, Megatron-Core or vLLM is
imported."""

import argparse
import io
import logging
import os
import resource
import sys
import time
import warnings
from typing import Any

from megatron_espo.errors import InputError
from megatron_espo.tools.parity import cases
from megatron_espo.tools.plan import command as plan

SERVE = "Run vLLM's server on this machine for a run whose rollout.hosts names this machine."
SERVE_EXAMPLES = """\
on each engine's machine:
  CUDA_VISIBLE_DEVICES=0,1,2,3 megatron-espo serve runs/mine --listen 10.0.0.5:7700
on the trainer's machine:
  torchrun ... -m megatron_espo train run.yaml run.dir=runs/mine 'rollout.hosts=["10.0.0.5:7700"]'
exit codes:
  0 the run ended, or SIGTERM; 1 no owner and no heartbeat of the run for --idle seconds
"""
PARITY = """\
Train one recorded batch in every parallel layout that the ranks allow. Compare loss, gradient norm
and the gradient of each tensor with those of one rank. Exit code 1 if one differs."""
PARITY_EXAMPLES = """\
this machine:    megatron-espo parity
a cluster:       srun torchrun ... -m megatron_espo parity --folder /shared/parity run.yaml
"""
TRAIN_EXAMPLES = """\
one process:     megatron-espo train run.yaml optimizer.lr=2e-6
several ranks:   torchrun --nproc-per-node 8 -m megatron_espo train run.yaml \\
                   megatron.tensor_model_parallel_size=2
"""
EVAL = """\
Sample and judge eval.prompts (or data.prompts) with the weights of model.path. Megatron is not
needed."""
EVAL_EXAMPLES = """\
greedy:          megatron-espo eval run.yaml eval.prompts=a.jsonl eval.samples=1 eval.temperature=0
after a run:     megatron-espo eval run.yaml model.path=runs/mine/hf eval.samples=16
"""


_SILENT_RANK_S = 5.0
_MIN_OPEN_FILES = 256


class _ReferenceHelp(argparse.Action):
    """``--help`` with every setting. Imports pydantic only when used, because ``doctor`` must
    run without it."""

    def __init__(self, option_strings: list[str], dest: str, **_: Any):
        text = "show every setting and exit"
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=text)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from megatron_espo.config import render_reference

        print(f"{parser.format_help()}\n{render_reference()}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    about = "RL post-training on Megatron-Core and vLLM."
    parser = argparse.ArgumentParser("megatron-espo", description=about)
    names = "{train,serve,plan,eval,report,convert,parity,doctor}"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)

    def add(name: str, text: str, about: str = "", examples: str = "", **options: Any) -> Any:
        raw = argparse.RawDescriptionHelpFormatter
        options |= {"description": about or None, "epilog": examples, "formatter_class": raw}
        return commands.add_parser(name, help=text, **options).add_argument

    about = "Train a model with the settings of a YAML file."
    option = add(
        "train", "train a model (also under torchrun)", about, TRAIN_EXAMPLES, add_help=False
    )
    option("-h", "--help", action=_ReferenceHelp)
    _add_config(option)

    option = add(
        "serve", "run a vLLM server for a trainer on other machines", SERVE, SERVE_EXAMPLES
    )
    option("run", metavar="RUN_DIR", help="the run's folder, on a file system of all machines")
    address = "address of this machine; default: its host name, port 7700"
    option("--listen", metavar="HOST:PORT", help=address)
    idle = "exit after this time without owner and heartbeat of the run (%(default)g)"
    option("--idle", type=float, default=3600.0, metavar="SECONDS", help=idle)
    option("--print", action="store_true", help="print the server's command and exit")

    plan.add_parser(commands, lambda parser: _add_config(parser.add_argument))

    option = add("eval", "avg@k and pass@k of a model on held-out prompts", EVAL, EVAL_EXAMPLES)
    _add_config(option)
    option("--out", metavar="FILE.json", help="default: eval.json in run.dir")

    option = add("report", "write one self-contained HTML page about one or several runs")
    option("runs", metavar="RUN", nargs="+", help="run folders")
    page = "default: RUN/report.html, or comparison.html beside the first of several runs"
    option("--out", metavar="PAGE.html", help=page)

    text = "Hugging Face weights to a Megatron checkpoint, or back"
    convert = commands.add_parser("convert", help=text)
    names = "{to-megatron,to-hf}"
    directions = convert.add_subparsers(dest="direction", required=True, metavar=names)
    for direction, text in (
        ("to-megatron", "write model.path as a Megatron checkpoint"),
        ("to-hf", "write a Megatron checkpoint as a Hugging Face folder"),
    ):
        option = directions.add_parser(direction, help=text).add_argument
        option("config", metavar="CONFIG.yaml", help="the run's settings")
        if direction == "to-hf":
            option("checkpoint", metavar="CHECKPOINT", help="Megatron checkpoint folder")
        option("out", metavar="OUT", help="folder to write")
        _add_overrides(option)

    text = "compare every parallel layout's gradient with one rank's"
    _add_parity(add("parity", text, PARITY, PARITY_EXAMPLES))

    option = add("doctor", "check this machine, or with --cluster the nodes of a run")
    text = "seconds for the import of one package (%(default)g)"
    option("--timeout", type=float, default=180.0, help=text)
    text = "check the nodes of a run together; start it on every rank (torchrun)"
    option("--cluster", action="store_true", help=text)
    text = "with --cluster: a folder that all nodes share (%(default)s)"
    option("--folder", default=".", help=text)
    return parser


def _add_parity(option: Any) -> None:
    model = "compare the model of this run; default: two tiny random models"
    option("config", metavar="CONFIG.yaml", nargs="?", help=model)
    _add_overrides(option)
    option("--short", action="store_true", help="a small part of the matrix, for tests")
    layouts = ", ".join(layout.name for layout in cases.LAYOUTS)
    option("--layouts", help=f"comma-separated, of: {layouts}")
    option("--micro-batches", help=f"comma-separated, of: {', '.join(cases.MICRO_BATCHES)}")
    option("--objectives", help=f"comma-separated, of: {', '.join(cases.OBJECTIVES)}")
    option(
        "--ranks", type=int, default=4, help="most ranks to start without torchrun (%(default)s)"
    )
    option(
        "--tolerance", type=float, default=1e-4, help="largest relative difference (%(default)s)"
    )
    option("--num-layers", type=int, help="layers of the model to keep, so that it fits one rank")
    option("--folder", help="folder for batch and reference; default: a temporary one")
    text = "only write batch and reference, on one rank, to --folder"
    option("--record", action="store_true", help=text)


def _add_config(option: Any) -> None:
    option("config", metavar="CONFIG.yaml", help="the run's settings")
    _add_overrides(option)


def _add_overrides(option: Any) -> None:
    text = "settings that replace those of the file"
    option("overrides", metavar="section.key=value", nargs="*", help=text)


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit code: 0 success, 1 a failed check, 2 a user error, 130 interrupted.
    """
    _prepare_process()
    args = _parse(build_parser(), argv)
    config = None
    try:
        if args.command in ("doctor", "report", "parity", "plan", "serve"):
            return _run_tool(args)
        config = _load_config(args)
        _work(args, config)
        return 0
    except InputError as error:
        _report(error, checked=config is not None)
        return 2
    except KeyboardInterrupt:
        return 130


def _parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse arguments. Overrides may also follow options, which argparse alone does not allow."""
    args, rest = parser.parse_known_args(argv)
    wrong = [word for word in rest if word.startswith("-") or "=" not in word]
    if wrong or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(wrong or rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _run_tool(args: argparse.Namespace) -> int:
    """Run a command that loads its configuration itself or has none."""
    if args.command == "doctor":
        if args.cluster:
            from megatron_espo.tools import preflight

            return preflight.main(args.folder, args.timeout)
        from megatron_espo.tools import doctor

        return doctor.main(args.timeout)
    if args.command == "report":
        from megatron_espo.monitoring.report.page import write_report

        print(f"report: {write_report(args.runs, args.out)}")
        return 0
    if args.command == "parity":
        from megatron_espo.tools.parity import command

        request = command.make_request(args)
        _silence_dependencies()
        return command.main(request)
    _silence_dependencies()
    if args.command == "plan":
        return plan.run(args)
    from megatron_espo.rollout import keeper

    return keeper.main(args.run, args.listen, args.idle, args.print)


def _load_config(args: argparse.Namespace) -> Any:
    """Read the configuration and check what the command needs of it."""
    from megatron_espo.config import checks, load_config

    config = load_config(args.config, args.overrides)
    if args.command != "eval":  # eval has no ranks
        checks.check_world_size(config, _world_size())
    hf_config = checks.check_model(config)
    if args.command == "train":
        checks.check_router(config, hf_config)
    if args.command in ("train", "eval"):
        _check_open_files()
        checks.check_paths(config)
        if os.environ.get("RANK", "0") == "0":
            from megatron_espo.data.sources import read_rows
            from megatron_espo.rewards.golds import check_golds

            data, evaluation = config.data, config.eval
            columns = data.columns if evaluation.columns is None else evaluation.columns
            sources = [(data.prompts, data.task_args, data.columns)]
            if evaluation.prompts:
                sources.append((evaluation.prompts, evaluation.task_args, columns))
            for prompts, arguments, columns in sources:
                rows = read_rows(prompts, arguments, config.run.seed, columns)
                check_golds(rows, prompts, config)
    return config


def _world_size() -> int:
    """Ranks that the launcher started.

    Raises:
        InputError: variables of a launcher are incomplete, such as those of an earlier shell.
    """
    rank, world_size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
    if world_size == "1" or (rank is not None and world_size.isdecimal()):
        return int(world_size)
    raise InputError(
        f"environment: expected RANK beside WORLD_SIZE={world_size}, got {rank}; start several "
        "ranks with torchrun, or `unset WORLD_SIZE` for one process"
    )


def _prepare_process() -> None:
    """Allow this process what the machine allows, and any text on any terminal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    wanted = 65_536
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _check_open_files() -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and limit < _MIN_OPEN_FILES:
        raise InputError(
            f"ulimit -n: expected at least {_MIN_OPEN_FILES} open files, got {limit}; raise the "
            "hard limit of this shell, container or service"
        )


def _silence_dependencies() -> None:
    """Hide what Megatron, torch and vLLM log about missing or deprecated parts. ``doctor``
    reports it."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    for name in ("vllm", "megatron"):
        logging.getLogger(name).setLevel(logging.ERROR)
    modules = r"megatron\.|torch\.distributed|megatron_espo\.distributed\.cpu"
    warnings.filterwarnings("ignore", module=modules)


def _work(args: argparse.Namespace, config: Any) -> None:
    _silence_dependencies()
    if args.command == "train":
        from megatron_espo.trainer.train import train

        train(config)
    elif args.command == "eval":
        from megatron_espo.rollout.evaluation import evaluate_model

        evaluate_model(config, args.out)
    elif args.direction == "to-megatron":
        from megatron_espo.tools.convert import hf_to_megatron

        hf_to_megatron(config, args.out)
    else:
        from megatron_espo.tools.convert import megatron_to_hf

        megatron_to_hf(config, args.checkpoint, args.out)


def _report(error: InputError, checked: bool) -> None:
    """Print an error on rank 0, and on another rank only if rank 0 may not have seen it.

    The first checks give the same error on all ranks of a node. Later errors may concern one rank.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    elif checked or os.environ.get("LOCAL_RANK") == "0":
        print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
    else:
        # torchrun kills all ranks when one ends. The rank that prints must end first.
        time.sleep(_SILENT_RANK_S)


if __name__ == "__main__":
    sys.exit(main())
