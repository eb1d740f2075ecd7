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

_SILENT_RANK_S = 5.0
_MIN_OPEN_FILES = 256


class _Parser(argparse.ArgumentParser):
    """Adds every setting to the help of ``train``."""

    def format_help(self) -> str:
        text = super().format_help()
        if not self.prog.endswith(" train"):
            return text
        from megatron_espo.config import render_reference  # needs pydantic; doctor must not

        return f"{text}\n{render_reference()}"


def build_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    about = "RL post-training on Megatron-Core and vLLM."
    parser = argparse.ArgumentParser("megatron-espo", description=about)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    def add(name: str, about: str, to: Any = commands) -> Any:
        return to.add_parser(name, help=about, description=about)

    option = add("train", "Train a model with the settings of a YAML file.").add_argument
    _add_config(option)

    text = "Run vLLM's server for a run whose rollout.hosts has this machine."
    option = add("serve", text).add_argument
    option("run", metavar="RUN_DIR", help="the run's folder, on a file system of all machines")
    address = "address of this machine; default: its host name, port 7700"
    option("--listen", metavar="HOST:PORT", help=address)
    idle = "exit after this time without owner and heartbeat of the run (%(default)g)"
    option("--idle", type=float, default=3600.0, metavar="SECONDS", help=idle)

    text = "Print what a run needs, without GPUs and weights. Exit code 1: it does not fit."
    option = add("plan", text).add_argument
    _add_config(option)
    plan.add_options(option)

    text = "Evaluate the weights of model.path on eval.prompts, without Megatron."
    option = add("eval", text).add_argument
    _add_config(option)
    option("--out", metavar="FILE.json", help="default: eval.json in run.dir")

    option = add("report", "Write one HTML page about one or several runs.").add_argument
    option("runs", metavar="RUN", nargs="+", help="run folders")
    page = "default: RUN/report.html, or comparison.html beside the first of several runs"
    option("--out", metavar="PAGE.html", help=page)

    convert = add("convert", "Convert Hugging Face weights to a Megatron checkpoint, or back.")
    directions = convert.add_subparsers(dest="direction", required=True)
    option = add("to-megatron", "Write model.path as a Megatron checkpoint.", directions)
    _add_config(option.add_argument, out="folder to write")
    option = add("to-hf", "Write a Megatron checkpoint as a Hugging Face folder.", directions)
    _add_config(option.add_argument, checkpoint="Megatron checkpoint", out="folder to write")

    text = "Compare the gradients of parallel layouts with one rank's. Exit code 1: one differs."
    option = add("parity", text).add_argument
    model = "compare the model of this run; default: two tiny random models"
    option("config", metavar="CONFIG.yaml", nargs="?", help=model)
    _add_overrides(option)
    option("--short", action="store_true", help="a small part of the matrix, for tests")
    text = "only this one of %(choices)s; repeat it for several"
    option("--layout", action="append", choices=list(cases.LAYOUTS), metavar="LAYOUT", help=text)
    text = "most ranks to start without torchrun (%(default)s)"
    option("--ranks", type=int, default=4, help=text)
    text = "largest relative difference (%(default)s)"
    option("--tolerance", type=float, default=1e-4, help=text)
    option("--num-layers", type=int, help="layers of the model to keep, so that it fits one rank")
    option("--folder", help="shared folder for batch and reference; default: a temporary one")

    option = add("doctor", "Check this machine, or the nodes of a run together.").add_argument
    text = "seconds for the import of one package (%(default)g)"
    option("--timeout", type=float, default=180.0, help=text)
    text = "check the nodes of a run; start it on every rank (torchrun)"
    option("--cluster", action="store_true", help=text)
    text = "with --cluster: a folder that all nodes share (%(default)s)"
    option("--folder", default=".", help=text)
    return parser


def _add_config(option: Any, **more: str) -> None:
    option("config", metavar="CONFIG.yaml", help="the run's settings")
    for name, text in more.items():
        option(name, metavar=name.upper(), help=text)
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
    try:
        return _run(args)
    except InputError as error:
        _report(error, checked=hasattr(args, "checked"))
        return 2
    except OSError as error:
        if error.filename is None or args.command == "train":  # a run reports its own failures
            raise
        _report(InputError(f"{error.filename}: {error.strerror}"), checked=True)
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


def _run(args: argparse.Namespace) -> int:
    """Run the command; each part is imported only for its command."""
    if args.command == "doctor":
        from megatron_espo.tools import doctor

        if not args.cluster:
            return doctor.main(args.timeout)
        from megatron_espo.tools import preflight

        return preflight.main(args.folder, args.timeout)
    _silence_dependencies()
    if args.command == "report":
        from megatron_espo.monitoring.report.page import write_report

        print(f"report: {write_report(args.runs, args.out)}")
    elif args.command == "plan":
        return plan.run(args)
    elif args.command == "parity":
        from megatron_espo.tools.parity import command

        return command.main(args)
    elif args.command == "serve":
        from megatron_espo.rollout import keeper

        return keeper.main(args.run, args.listen, args.idle)
    else:
        _run_with_config(args)
    return 0


def _run_with_config(args: argparse.Namespace) -> None:
    config = _load_config(args)
    args.checked = True  # what follows may fail on this rank only
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


def _load_config(args: argparse.Namespace) -> Any:
    """Read the configuration and check what the command needs of it."""
    from megatron_espo.config import checks, load_config

    config = load_config(args.config, args.overrides)
    if args.command != "eval":  # eval has no ranks
        checks.check_world_size(config, _world_size())
    spec = checks.check_model(config)
    if args.command == "train":
        checks.check_router(config, spec)
    if args.command in ("train", "eval"):
        _check_open_files()
        sources = config.sources
        if args.command == "eval" and "eval" in sources:
            sources = {"eval": sources["eval"]}  # needs no training prompts
        checks.check_paths(config, sources)
        if os.environ.get("RANK", "0") == "0":
            from megatron_espo.data.sources import MissingColumns, read_rows
            from megatron_espo.rewards.golds import check_golds

            for path, source in sources.items():
                try:
                    rows = read_rows(source, config.run.seed)
                except MissingColumns as error:
                    checks.fail(config, f"{path}.columns", str(error))
                check_golds(rows, source.prompts, config)
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
