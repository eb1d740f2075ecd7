"""Run a function on several gloo ranks, under the launcher of ``torchrun``.

    run_ranks(2, "tests.support.ranks.numerics:check_gradient", temperature=0.7)

The function gets the keyword arguments on every rank. Rank 0's result is returned. Arguments and
result are sent as JSON. An exception on any rank fails the caller with the ranks' output.

Launcher and ranks are forked from a process that has imported the package with torch,
Megatron-Core and vLLM, because the imports take longer than most functions. That process runs no
test code itself.
"""

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(nproc: int, target: str, timeout: float = 240, **kwargs: Any) -> Any:
    """Call ``target`` (``module:function``) on ``nproc`` ranks; return rank 0's result."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        outcome, output = _fork(nproc, [target, kwargs, str(result)], timeout, dict(os.environ))
        assert outcome == 0, f"{target} on {nproc} ranks failed\n{output[-6000:]}"
        return json.loads(result.read_text())


def run_command(
    nproc: int,
    *arguments: str,
    environment: dict[str, str] | None = None,
    timeout: float = 900,
    target: str = "tests.support.distributed:command",
    **kwargs: Any,
) -> subprocess.CompletedProcess:
    """``torchrun ... -m tests.faults.inject ARGUMENTS`` without the time of the imports.

    Args:
        target: called instead, with ``kwargs``.

    Returns:
        The launcher's exit code (0 or 1), and all output both as stdout and as stderr.
    """
    function = [target, kwargs or {"arguments": arguments}, None]
    outcome, output = _fork(nproc, function, timeout, environment or dict(os.environ))
    return subprocess.CompletedProcess(arguments, outcome, output, output)


def command(arguments: list[str]) -> None:
    """The command on a forked rank."""
    from megatron_espo.cli import main
    from tests.faults import inject

    inject.install()
    sys.exit(main(arguments))


def _fork(
    nproc: int, function: list, timeout: float, environment: dict[str, str]
) -> tuple[int, str]:
    """The launcher's exit code and the ranks' output."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        place = {"nproc": nproc, "log": str(log), "environment": environment}
        server = _server()
        print(
            json.dumps({"function": function, "place": place, "timeout": timeout}),
            file=server.stdin,
            flush=True,
        )
        outcome = json.loads(server.stdout.readline())
        output = log.read_text(errors="replace")
        if outcome is None:
            for file in sorted(Path(folder).glob("log.stacks*")):
                output += f"\n{file.suffix}: {file.read_text()[:1000]}"
    assert outcome is not None, (
        f"{function[0]} on {nproc} ranks: not finished after {timeout} s\n{output[-6000:]}"
    )
    return outcome, output


@cache
def _server() -> subprocess.Popen:
    """Start the process that forks the ranks. It ends when its input closes."""
    # The caller's path may have another Megatron-Core (tools/test_compat.sh).
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.distributed"]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def serve() -> None:
    """Fork a launcher for each line of the input; print its exit status, ``null`` on a timeout."""
    for module in (
        "megatron_espo.trainer.train",
        "megatron_espo.trainer.colocation",
        "torch.distributed.launcher.api",
    ):
        importlib.import_module(module)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if not pid:
            _launch(job["function"], **job["place"])
        print(json.dumps(_outcome(pid, time.monotonic() + job["timeout"])), flush=True)


def _outcome(pid: int, deadline: float) -> int | None:
    try:
        while time.monotonic() < deadline:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        os.killpg(pid, signal.SIGUSR1)  # launcher and ranks write their stacks
        time.sleep(1.0)
        return None
    finally:
        # The launcher leads its own process group. Kill what is left of it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _launch(function: list, nproc: int, log: str, environment: dict[str, str]) -> None:
    """Run ``torchrun --standalone --nproc-per-node NPROC`` with forked ranks. Does not return."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(environment, OMP_NUM_THREADS="1", TEST_STACKS=f"{log}.stacks")
    faulthandler.register(signal.SIGUSR1, open(f"{log}.stacks", "w"))
    config = LaunchConfig(
        1, 1, nproc, run_id=str(os.getpid()), rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        local_addr="127.0.0.1", start_method="fork", max_restarts=0, monitor_interval=0.1,
    )  # fmt: skip
    status = 0
    try:
        elastic_launch(config, _rank)(*function)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _rank(target: str, kwargs: dict, file: str | None) -> None:
    """Initialize gloo, call the function, write rank 0's result. ``None``: call the function."""
    import torch

    torch.set_num_threads(1)
    stacks = open(f"{os.environ['TEST_STACKS']}.rank{os.environ['RANK']}", "w")  # never closed
    faulthandler.register(signal.SIGUSR1, stacks)
    module, name = target.split(":")
    function = getattr(importlib.import_module(module), name)
    if file is None:
        return function(**kwargs)
    try:
        torch.distributed.init_process_group("gloo")
        result = function(**kwargs)
        if torch.distributed.get_rank() == 0:
            Path(file).write_text(json.dumps(result))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        for line in traceback.format_exc().splitlines():
            print(f"[rank{os.environ['RANK']}] {line}", file=sys.stderr, flush=True)
        raise


if __name__ == "__main__":
    serve()
