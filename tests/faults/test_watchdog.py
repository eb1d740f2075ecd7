"""The watchdog names the culprit among processes that work, wait, loop or freeze. Without torch."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_espo.distributed.watchdog import EXIT_CODE, Watchdog
from megatron_espo.files import read_json
from tests.support.distributed import ROOT

RANK = """
import faulthandler, sys, time
from pathlib import Path
from megatron_espo.distributed.watchdog import Watchdog
folder, rank, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
sys.path.insert(0, str(folder))
from distributed_c10d import all_reduce

def work(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        watchdog.heartbeat()
        time.sleep(0.05)

log = (folder / "log").write_text
with Watchdog(folder, rank, ranks, limit_s=1.0, slow_s=60.0, log=log) as watchdog:
    watchdog.heartbeat("train", 7)
"""
COLLECTIVE = "import time\ndef all_reduce(seconds=60):\n    time.sleep(seconds)\n"


def start(folder, *bodies: str) -> list[subprocess.Popen]:
    """Start one process with a watchdog for each body."""
    (folder / "distributed_c10d.py").write_text(COLLECTIVE)
    Watchdog.clear(folder)
    return [
        subprocess.Popen(
            [sys.executable, "-c", f"{RANK}    {body}", str(folder), str(rank), str(len(bodies))],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
        )
        for rank, body in enumerate(bodies)
    ]  # fmt: skip


def end(processes: list[subprocess.Popen]) -> tuple[list[int], str]:
    """Return the exit codes and all output."""
    output = "".join(process.communicate(timeout=180)[1] for process in processes)
    return [process.returncode for process in processes], output


def test_a_frozen_process_is_named_and_killed(tmp_path):
    processes = start(tmp_path, "work(1); all_reduce()", "work(30)", "all_reduce()")
    deadline = time.monotonic() + 30
    while read_json(tmp_path / "heartbeats" / "rank1.json").get("phase") != "train":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(processes[1].pid, signal.SIGSTOP)
    codes, output = end(processes)
    assert codes == [EXIT_CODE, -signal.SIGKILL, EXIT_CODE]
    assert (
        output.count("error: ") == 1
        and f"rank 1 (process {processes[1].pid} on " in output
        and "step 7, phase train" in output
    ), output
    assert "its process does not run" in output and (tmp_path / "log").read_text() in output
    for rank in (0, 2):
        assert "in all_reduce" in (tmp_path / "heartbeats" / f"rank{rank}.stacks.txt").read_text()


def test_a_process_frozen_in_a_collective_is_named_although_others_have_waited_longer(tmp_path):
    processes = start(tmp_path, "all_reduce()", "work(0.5); all_reduce()")
    deadline = time.monotonic() + 30
    while not read_json(tmp_path / "heartbeats" / "rank1.json").get("waits_in"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(processes[1].pid, signal.SIGSTOP)
    codes, output = end(processes)
    assert (
        codes == [EXIT_CODE, -signal.SIGKILL]
        and f"rank 1 (process {processes[1].pid} on " in output
    ), output


def test_an_endless_loop_is_named_although_others_have_waited_longer(tmp_path):
    processes = start(
        tmp_path, "all_reduce()", "work(1); [None for _ in iter(lambda: time.sleep(0.01), 1)]"
    )
    codes, output = end(processes)
    assert (
        codes == [EXIT_CODE] * 2
        and f"rank 1 (process {processes[1].pid} on " in output
        and "inside no collective" in output
    ), output
    assert "<lambda>" in (tmp_path / "heartbeats" / "rank1.stacks.txt").read_text()


def test_in_a_hung_collective_the_first_to_stand_still_is_named(tmp_path):
    processes = start(
        tmp_path, "work(1.5); all_reduce()", "work(0.5); all_reduce()", "work(1.5); all_reduce()"
    )
    codes, output = end(processes)
    assert (
        codes == [EXIT_CODE] * 3
        and f"rank 1 (process {processes[1].pid} on " in output
        and "waits in all_reduce" in output
    ), output


@pytest.mark.parametrize(
    "working",
    ["work(4)", "watchdog.heartbeat('sync'); all_reduce(4)"],
    ids=["progress", "a slow phase"],
)
def test_ranks_that_wait_for_a_working_rank_are_not_ended(tmp_path, working):
    codes, output = end(start(tmp_path, "all_reduce(4.5)", working, "pass"))
    assert codes == [0] * 3 and not output and not (tmp_path / "log").exists()


def test_a_segmentation_fault_leaves_its_stacks(tmp_path):
    codes, _ = end(start(tmp_path, "faulthandler._sigsegv()"))
    assert (
        codes == [-signal.SIGSEGV]
        and "Segmentation fault" in (tmp_path / "heartbeats" / "rank0.stacks.txt").read_text()
    )


def test_a_dead_rank_is_named(tmp_path):
    (process,) = start(tmp_path, "work(0.1)")
    end([process])
    assert Watchdog(tmp_path, 1, 2, limit_s=1, slow_s=1, log=print).gone() == [], (
        "it ended without an error"
    )
    processes = start(tmp_path, "os = __import__('os'); os.kill(os.getpid(), 9)")
    end(processes)
    (name,) = Watchdog(tmp_path, 1, 2, limit_s=1, slow_s=1, log=print).gone()
    assert name.startswith(f"rank 0 (process {processes[0].pid} on ")
