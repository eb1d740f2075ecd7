"""Two hosts with addresses of their own: network namespaces joined by one cable, which may be pulled out. Needs root."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed import ROOT

ADDRESSES = ("10.77.0.1", "10.77.0.2")
WATCHDOG_S, ENGINE_S = 20, 20
# Two ranks, one a host: tensor parallelism crosses the cable.
SMALLER = ["megatron.pipeline_model_parallel_size=1", "megatron.virtual_pipeline_model_parallel_size=null", "megatron.sequence_parallel=true"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def may_make_hosts() -> bool:
    name = f"espo-try-{os.getpid()}"
    if os.geteuid() or not shutil.which("ip") or subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return False
    ip("netns", "del", name)
    return True


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not may_make_hosts(), reason="network namespaces need root and iproute2")]


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two namespaces whose ``eth0`` are the ends of one cable."""
    names, ends = ([f"{kind}{os.getpid()}{side}" for side in "ab"] for kind in ("espo", "e"))
    for name in names:
        ip("netns", "add", name)
    try:
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "link", "set", end, "name", "eth0")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def launch(hosts: list[str], folder: Path, *overrides: str) -> list[subprocess.Popen]:
    """The rehearsal's command on both hosts; they share ``folder``."""
    place = {"NNODES": "2", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29577", "NPROC_PER_NODE": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    command = ["bash", str(ROOT / "examples" / "run_espo_70b.sh"), "--rehearse", *SMALLER, *overrides]
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *command],
            cwd=folder,
            env=os.environ | place | {"NODE_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=(folder / f"host{rank}.log").open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for rank, name in enumerate(hosts)
    ]


def end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def logs(folder: Path) -> str:
    return "\n".join(path.read_text()[-4000:] for path in sorted(folder.glob("host*.log")))


def test_a_run_over_two_hosts_ends_and_a_cable_pulled_out_is_told(hosts, tmp_path):
    processes = launch(hosts, tmp_path, "run.steps=2")
    try:
        assert [process.wait(150) for process in processes] == [0, 0], logs(tmp_path)
    finally:
        end(processes)
    run = tmp_path / "runs" / "rehearsal" / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert max(line.get("mismatch/logprob_gap_mean", 0.0) for line in lines) < 1e-4
    assert json.loads((run / "status.json").read_text())["state"] == "done"

    processes = launch(hosts, tmp_path, "run.steps=500", f"run.watchdog_s={WATCHDOG_S}", f"rollout.timeout_s={ENGINE_S}")
    try:
        begun, metrics = time.monotonic(), run / "metrics.jsonl"
        while not metrics.exists() or not metrics.read_text():
            assert all(process.poll() is None for process in processes) and time.monotonic() < begun + 150, logs(tmp_path)
            time.sleep(0.2)
        ip("-n", hosts[1], "link", "set", "eth0", "down")
        # The limit, the engine's where the phase is one without progress, and the time in which all ranks see the verdict.
        codes = [process.wait(WATCHDOG_S + ENGINE_S + 60) for process in processes[:1]]
        assert codes[0] != 0
    finally:
        end(processes)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed" and "stands still" in status["why"], (status, logs(tmp_path))
    assert sum(line.startswith("error: ") for line in logs(tmp_path).splitlines()) == 1, logs(tmp_path)
