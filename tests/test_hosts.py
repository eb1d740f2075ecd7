"""Runs over several hosts: network namespaces on a switch, which tests disconnect. Needs root."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_espo.rollout.server import run_key
from tests.support.distributed import ROOT
from tests.support.real_engine import engine_config
from tests.support.tiny import save_tiny_model

ADDRESSES = ("10.77.0.1", "10.77.0.2", "10.77.0.3")
WATCHDOG_S, ENGINE_S = 20, 20
HOST_S = 10
REHEARSAL = ["bash", str(ROOT / "examples" / "run_espo_70b.sh"), "--rehearse"]
# Two ranks on two hosts: tensor parallelism uses the network.
SMALLER = [
    "megatron.pipeline_model_parallel_size=1",
    "megatron.virtual_pipeline_model_parallel_size=null",
    "megatron.sequence_parallel=true",
]
# Engines on other machines do not share memory, as in examples/slurm/espo_disaggregated.sbatch.
OWN_MEMORY = ["rollout.sleep=false", "megatron.offload=[]"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def may_make_hosts() -> bool:
    name = f"espo-try-{os.getpid()}"
    if (
        os.geteuid()
        or not shutil.which("ip")
        or subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode
    ):
        return False
    ip("netns", "del", name)
    return True


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not may_make_hosts(), reason="network namespaces need root and iproute2"),
]


@contextmanager
def on_one_switch(count: int) -> Iterator[list[str]]:
    """Namespaces whose ``eth0`` have the first ``ADDRESSES``, joined by a bridge in another one."""
    switch, *names = (f"espo{os.getpid()}{letter}" for letter in "sabc"[: count + 1])
    for name in (switch, *names):
        ip("netns", "add", name)
    try:
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for name, address in zip(names, ADDRESSES, strict=False):
            port = f"to-{name[-1]}"
            ip(*f"-n {name} link add eth0 type veth peer name {port} netns {switch}".split())
            ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in (switch, *names):
            ip("netns", "del", name)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    with on_one_switch(2) as names:
        yield names


@pytest.fixture
def three_hosts() -> Iterator[list[str]]:
    with on_one_switch(3) as names:
        yield names


def launch(hosts: list[str], folder: Path, *overrides: str) -> list[subprocess.Popen]:
    """The rehearsal's command on both hosts; they share ``folder``."""
    place = {
        "NNODES": "2",
        "MASTER_ADDR": ADDRESSES[0],
        "MASTER_PORT": "29577",
        "NPROC_PER_NODE": "1",
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    command = [*REHEARSAL, *SMALLER, *overrides]
    return [
        start_on(name, folder, f"host{rank}.log", command, NODE_RANK=str(rank), **place)
        for rank, name in enumerate(hosts)
    ]


def end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def logs(folder: Path) -> str:
    return "\n".join(path.read_text()[-4000:] for path in sorted(folder.glob("host*.log")))


def test_a_run_over_two_hosts_ends(hosts, tmp_path):
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


def test_a_cable_pulled_out_is_told_in_time(hosts, tmp_path):
    run = tmp_path / "runs" / "rehearsal" / "run"
    processes = launch(
        hosts,
        tmp_path,
        "run.steps=500",
        f"run.watchdog_s={WATCHDOG_S}",
        f"rollout.timeout_s={ENGINE_S}",
    )
    try:
        begun, metrics = time.monotonic(), run / "metrics.jsonl"
        while not metrics.exists() or not metrics.read_text():
            assert (
                all(process.poll() is None for process in processes)
                and time.monotonic() < begun + 150
            ), logs(tmp_path)
            time.sleep(0.2)
        ip("-n", hosts[1], "link", "set", "eth0", "down")
        # The watchdog's limit, the engine's limit, and the time until all ranks end.
        assert processes[0].wait(WATCHDOG_S + ENGINE_S + 60) != 0
    finally:
        end(processes)
    status = json.loads((run / "status.json").read_text())
    text = logs(tmp_path)
    assert status["state"] == "failed" and "stands still" in status["why"], (status, text)
    assert sum(line.startswith("error: ") for line in text.splitlines()) == 1, text


# -- engines on hosts without trainer ranks ------------------------------------------------------


def start_on(name: str, folder: Path, log: str, command: list[str], **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["ip", "netns", "exec", name, *command],
        cwd=folder,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        | env,
        stdout=(folder / log).open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@contextmanager
def disaggregated(
    hosts: list[str], folder: Path, *overrides: str
) -> Iterator[list[subprocess.Popen]]:
    """The rehearsal's trainer (two ranks) on the first host, and a keeper on each other host."""
    addresses = [f"{address}:7700" for address in ADDRESSES[1 : len(hosts)]]
    serve = [sys.executable, "-m", "megatron_espo", "serve", "runs/rehearsal/run", "--listen"]
    keepers = [
        start_on(name, folder, f"host{i}.log", [*serve, addresses[i - 1]])
        for i, name in enumerate(hosts)
        if i
    ]
    settings = [f"rollout.hosts={addresses}", f"rollout.host_timeout_s={HOST_S}"]
    command = [*REHEARSAL, *SMALLER, *settings, *OWN_MEMORY, *overrides]
    place = {"NPROC_PER_NODE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [start_on(hosts[0], folder, "host0.log", command, **place), *keepers]
    try:
        yield processes
    finally:
        end(processes)


def wait_for_step(step: int, folder: Path, process: subprocess.Popen, limit_s: float = 240) -> None:
    metrics, deadline = (
        folder / "runs" / "rehearsal" / "run" / "metrics.jsonl",
        time.monotonic() + limit_s,
    )
    while not metrics.exists() or metrics.read_text().count("\n") < step:
        assert process.poll() is None and time.monotonic() < deadline, logs(folder)
        time.sleep(0.1)


def wait_for_text(text: str, log: Path, process: subprocess.Popen, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while text not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, logs(log.parent)
        time.sleep(0.1)


INFO = """
import sys, urllib.request
headers = {"Authorization": f"Bearer {sys.argv[2]}", "Content-Type": "application/json"}
request = urllib.request.Request(sys.argv[1], b"{}", headers)
print(urllib.request.urlopen(request, timeout=20).read().decode())
"""


def index_of_server(hosts: list[str], folder: Path) -> int:
    """The host whose server has an owner: the first one that was ready."""
    key = run_key(str(folder / "runs" / "rehearsal" / "run"))
    for i in range(1, len(hosts)):
        url = f"http://{ADDRESSES[i]}:7700/megatron_espo/info"
        command = ["ip", "netns", "exec", hosts[0], sys.executable, "-c", INFO, url, key]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if json.loads(done.stdout)["owner"]:
            return i
    raise AssertionError("no server has an owner")


def steps_of(folder: Path) -> list[int]:
    metrics = folder / "runs" / "rehearsal" / "run" / "metrics.jsonl"
    return [json.loads(line)["step"] for line in metrics.read_text().splitlines()]


def test_an_engine_host_that_is_cut_off_is_replaced_by_the_spare(three_hosts, tmp_path):
    """One engine, two hosts. Every step is trained once. Weights go through the run's folder."""
    with disaggregated(three_hosts, tmp_path, "run.steps=30") as (trainer, *keepers):
        wait_for_step(2, tmp_path, trainer)
        for i in (1, 2):
            wait_for_text("is ready", tmp_path / f"host{i}.log", trainer)
        first = index_of_server(three_hosts, tmp_path)
        began, told = time.monotonic(), None
        ip("-n", three_hosts[first], "link", "set", "eth0", "down")
        while told is None:
            if "restarting the rollout engine" in (tmp_path / "host0.log").read_text():
                told = time.monotonic() - began
            assert trainer.poll() is None and time.monotonic() < began + 60, logs(tmp_path)
            time.sleep(0.1)
        assert told < HOST_S + 15  # the limit, and a step's training on a busy machine
        assert trainer.wait(400) == 0, logs(tmp_path)
        # The lease of the server that was cut off ran out, and its keeper started another server.
        assert "the server ended with exit code -9" in (tmp_path / f"host{first}.log").read_text()
        codes = [keeper.wait(20) for keeper in keepers]
        assert codes == [0, 0], "the keepers see that the run is over"
    assert steps_of(tmp_path) == list(range(1, 31))
    run = tmp_path / "runs" / "rehearsal" / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("mismatch/logprob_gap_mean", 0.0) for line in lines) < 1e-4
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    text = (tmp_path / "host0.log").read_text()
    # The lease or a request notices first.
    assert re.search(rf"{ADDRESSES[first]}:7700 (is out of reach|failed)", text), text
    assert "error" not in text, text
    assert "is over; this server ends" in (run / f"engine-{ADDRESSES[first]}-7700.log").read_text()
    assert (run / f"engine-{ADDRESSES[3 - first]}-7700.log").exists()


def test_an_engine_host_that_is_cut_off_without_a_spare_is_one_error_in_time(hosts, tmp_path):
    with disaggregated(hosts, tmp_path, "run.steps=500") as (trainer, _):
        wait_for_step(1, tmp_path, trainer)
        began = time.monotonic()
        ip("-n", hosts[1], "link", "set", "eth0", "down")
        # To notice, and to look for another host; then the ranks end.
        assert trainer.wait(2 * HOST_S + 60) != 0
        seconds = time.monotonic() - began
    lines = (tmp_path / "host0.log").read_text().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, logs(tmp_path)
    message = f"within {HOST_S} s (rollout.host_timeout_s): {ADDRESSES[1]}:7700: no answer"
    assert message in errors[0]
    status = json.loads((tmp_path / "runs" / "rehearsal" / "run" / "status.json").read_text())
    assert status["state"] == "failed" and ADDRESSES[1] in status["why"], status
    assert seconds < 2 * HOST_S + 40


# Samples, asks for health until the host is lost, and samples on the next host.
OWNER = """
import time
from megatron_espo.rollout.engine import EngineError, Sampling
from megatron_espo.rollout.http_client import HttpClient, LoopThread
from megatron_espo.rollout.server import EngineConfig, run_key
from megatron_espo.rollout.vllm_engine import VLLMEngine

config = {config!r}
loop = LoopThread()
engine = VLLMEngine(config, loop)

def start_and_sample():
    engine.start()
    engine.wait_ready()
    client = HttpClient(engine.address, run_key(config.folder), config.host_timeout_s)
    found = loop.run(client.generate("a", [1, 4, 5], Sampling(8, seed=1)), 60)
    print(engine.address, found.token_ids.tolist(), flush=True)

start_and_sample()
try:
    while True:
        engine._worker("ping")
        time.sleep(0.2)
except EngineError as error:
    print("lost:", str(error).splitlines()[0], flush=True)
start_and_sample()
engine.close()
"""


def test_owner_and_server_both_notice_a_cut(three_hosts, tmp_path):
    """The owner takes the next host. The lease of the server that was cut off runs out."""
    run, addresses = tmp_path / "run", tuple(f"{address}:7700" for address in ADDRESSES[1:])
    save_tiny_model(tmp_path / "model")
    config = engine_config(
        tmp_path / "model",
        run,
        max_model_len=64,
        load_weights=True,
        hosts=addresses,
        host_timeout_s=float(HOST_S),
        timeout_s=200.0,
    )
    serve = [sys.executable, "-m", "megatron_espo", "serve", str(run), "--listen"]
    keepers = [
        start_on(three_hosts[i], tmp_path, f"host{i}.log", [*serve, addresses[i - 1]])
        for i in (1, 2)
    ]
    command = [sys.executable, "-c", OWNER.format(config=config)]
    owner = start_on(three_hosts[0], tmp_path, "host0.log", command)

    def wait_for(text: str, name: str, limit_s: float) -> float:
        began = time.monotonic()
        while text not in (tmp_path / name).read_text():
            assert time.monotonic() < began + limit_s, (text, logs(tmp_path))
            time.sleep(0.1)
        return time.monotonic() - began

    try:
        wait_for(":7700 [", "host0.log", 200)
        first = 1 if f"{ADDRESSES[1]}:7700 [" in (tmp_path / "host0.log").read_text() else 2
        ip("-n", three_hosts[first], "link", "set", "eth0", "down")
        assert wait_for("lost: ", "host0.log", HOST_S + 10) > 1
        wait_for("ended with exit code -9", f"host{first}.log", HOST_S + 10)
        assert owner.wait(200) == 0, logs(tmp_path)
        (run / "status.json").write_text('{"state": "done"}')
        assert [keeper.wait(30) for keeper in keepers] == [0, 0]
    finally:
        end([owner, *keepers])
    lines = (tmp_path / "host0.log").read_text().splitlines()
    before, lost, after = [line for line in lines if line[:3] in ("10.", "los")]
    assert f"the rollout engine on {addresses[first - 1]} is out of reach" in lost
    assert after.startswith(addresses[2 - first])
    assert before.partition(" ")[2] == after.partition(" ")[2], "the same seed"
    assert "is over; this server ends" in (run / f"engine-{ADDRESSES[first]}-7700.log").read_text()
