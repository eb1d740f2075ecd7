"""The agent of an engine's machine, over loopback: whom it serves, what it ends, and how an owner goes on to the next one."""

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megatron_espo.addresses import parse_address, show_address
from megatron_espo.errors import InputError
from megatron_espo.rollout import Engine, EngineConfig, EngineError, dismiss, wire
from megatron_espo.rollout.versions import versions
from tests.distributed import ROOT

ENV = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def agent(folder: Path, address: str, *options: str, **env: str):
    """An agent that listens already; its words are in ``<folder>/<port>.out``."""
    log = folder.parent / f"{address.rpartition(':')[2]}.out"
    command = [sys.executable, "-m", "megatron_espo", "engine", str(folder), "--listen", address, *options]
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=ENV | env, stdout=out, stderr=subprocess.STDOUT)
    process.words = lambda: log.read_text()
    try:
        until(lambda: "listens on" in process.words() or process.poll() is not None, "the agent listens")
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(30)


def until(condition, what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def engine_config(folder: Path, *hosts: str, **changes) -> EngineConfig:
    """An engine that never gets as far as a model: its process lives for the seconds in which it imports vLLM."""
    model = folder.parent / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    options = dict(
        model=str(model), log_path=str(folder / "engine.log"), dtype="float32", transport="tcp", max_response_tokens=8,
        eos_ids=frozenset({2}), hosts=hosts, host_timeout_s=5.0, start_timeout_s=60.0,
    )  # fmt: skip
    return EngineConfig(**options | changes)


def engine_pid(words: str) -> int | None:
    """Of the engine that the agent started last."""
    return int(words.rpartition("(process ")[2].partition(")")[0]) if "(process " in words else None


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """``(run folder, address, process)`` of an agent that several tests use."""
    folder, address = tmp_path_factory.mktemp("served") / "run", free_address()
    with agent(folder, address) as process:
        yield folder, address, process


def test_one_owner_at_a_time_and_the_engine_ends_when_it_hangs_up(served, caplog):
    folder, address, process = served
    owner = Engine(engine_config(folder, address), decode=str).start()
    until(lambda: engine_pid(process.words()), "an engine")
    pid = engine_pid(process.words())
    # A second one hears whom the agent is busy with, and gives up in time.
    second = Engine(engine_config(folder, address, log_path=str(folder / "engine-rank1.log"), start_timeout_s=2.0), decode=str).start()
    with pytest.raises(EngineError, match=rf"none of rollout.hosts took .* within 2 s.*{address}: busy with engine of ") as error:
        second.wait_ready()
    assert error.value.final and second.state == "dead" and "no host for the rollout engine yet" in caplog.text
    assert lives(pid)
    owner._child.kill()
    until(lambda: not lives(pid), "the engine outlived its owner's connection")
    # The same owner may come back.
    owner.restart()
    until(lambda: engine_pid(process.words()) != pid, "another engine")
    pid = engine_pid(process.words())
    owner.close()
    assert not lives(pid), "closed means gone"


def test_strangers_are_turned_away(served, tmp_path):
    """Another key, another protocol, other versions, a model that is not there; and nothing but the given address listens."""
    folder, address, process = served
    host, port = address.split(":")
    wire.run_key(tmp_path)
    with pytest.raises(EngineError, match=f"{address}: it has another key than {tmp_path}/engine.key") as error:
        Engine(engine_config(tmp_path, address), decode=str).start().wait_ready()
    assert error.value.final
    until(lambda: "turned 127.0.0.1 away" in process.words(), "the agent says whom it turned away", 10)  # after the other side has heard it
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
    # One that says nothing keeps nobody waiting.
    with socket.create_connection((host, int(port))), wire.connect(host, int(port), wire.run_key(folder)) as connection:
        connection.send(("engine", versions() | {"vllm": "0.1"}, engine_config(folder, address), "engine of x"))
        answer, word = connection.recv()
        assert answer == "refused" and "other versions: vllm" in word and "0.1 there" in word
    nowhere = Engine(engine_config(folder, address, start_timeout_s=0.5, model="/nowhere"), decode=str)
    with pytest.raises(EngineError, match="no config.json in /nowhere on this machine"):
        nowhere._launch().connection  # noqa: B018  Engine.start looks for it itself
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"]
    assert f"0100007F:{int(port):04X}" in listening and f"00000000:{int(port):04X}" not in listening
    assert process.poll() is None and "runs engine of x" not in process.words()


def test_a_killed_agents_engine_dies_and_the_spare_takes_over(folder):
    first, spare = free_address(), free_address()
    with agent(folder, first) as process, agent(folder, spare) as other:
        engine = Engine(engine_config(folder, first, spare), decode=str).start()
        until(lambda: engine_pid(process.words()), process.words())
        pid = engine_pid(process.words())
        process.kill()
        until(lambda: not lives(pid), "the engine outlived its agent")
        with pytest.raises(EngineError, match=f"start: the rollout engine on {first} has died"):
            engine.wait_ready()
        engine.restart()
        until(lambda: engine_pid(other.words()), other.words())
        assert f"run by the agent on {spare}" in (folder / "engine.log").read_text()
        # SIGTERM ends the agent and its engine.
        pid = engine_pid(other.words())
        other.terminate()
        assert other.wait(20) == 0 and not lives(pid) and "ends: SIGTERM" in other.words()
        # Nobody is left.
        engine.restart()
        began = time.monotonic()
        with pytest.raises(EngineError, match=rf"within 5 s \(rollout.host_timeout_s\): {first}: no answer .*; {spare}: no answer"):
            engine.wait_ready()
        assert time.monotonic() - began < 15


OWNER = """
import sys, time
from megatron_espo.rollout import Engine, EngineConfig
engine = Engine({config!r}, decode=str).start()
time.sleep(600)
"""


def test_the_engine_dies_with_its_killed_owner_and_the_agent_with_the_run(served):
    folder, address, process = served
    started, freed = process.words().count("runs engine of"), process.words().count("is free")
    (folder / "owner.py").write_text(OWNER.format(config=engine_config(folder, address)))
    owner = subprocess.Popen([sys.executable, str(folder / "owner.py")], env=ENV)
    until(lambda: process.words().count("runs engine of") > started, "an engine")
    pid = engine_pid(process.words())
    owner.kill()
    owner.wait()
    until(lambda: not lives(pid), "the engine outlived its owner", 10)
    until(lambda: process.words().count("is free") > freed, "the agent is free", 10)
    dismiss([address], folder)
    assert process.wait(20) == 0 and process.words().endswith("agent: ends: the run is over\n")


def test_an_agent_that_nobody_needs_ends_with_a_word(folder):
    beats = folder / "heartbeats"
    beats.mkdir()
    (beats / "rank0.json").write_text('{"count": 7}')  # of a run that does not live any more
    began = time.monotonic()
    with agent(folder, free_address(), "--idle", "2") as process:
        assert process.wait(30) == 1 and time.monotonic() - began > 2
        assert f"ends: no owner and no sign of the run in {folder} for 2 s (--idle 2)" in process.words()


def test_a_spare_stays_as_long_as_the_run_lives(folder, monkeypatch):
    from megatron_espo.rollout import agent as module

    monkeypatch.setattr(module, "_HEARTBEAT_SECONDS", 0.0)
    sign = module.Sign(folder)
    time.sleep(0.3)
    assert sign.silence() > 0.2
    (folder / "heartbeats").mkdir()
    for count in range(2):
        (folder / "heartbeats" / "rank0.json").write_text(f'{{"count": {count}}}')
        assert sign.silence() < 0.1
    time.sleep(0.3)
    assert sign.silence() > 0.2


@pytest.mark.parametrize("address, message", [
    ("0.0.0.0:7700", "expected the address of one machine"),
    ("localhost", "expected host:port"),
    ("192.0.2.1:7700", "expected a free address of this machine, got 192.0.2.1:7700"),
])  # fmt: skip
def test_an_address_that_cannot_be_listened_on_is_said(folder, capsys, address, message):
    from megatron_espo import cli

    assert cli.main(["engine", str(folder), "--listen", address]) == 2
    assert f"error: --listen: {message}" in capsys.readouterr().err


def test_addresses_are_read_as_they_are_shown():
    for host, port in (("10.0.0.5", 7700), ("node-9.cluster", 1), ("fe80::1", 65535)):
        assert parse_address(show_address(host, port)) == (host, port)
    for wrong in ("node9", "node9:", "node9:0", "node9:65536", "::1:7700", "a b:1", "[::]:7700", "http://node9:1"):
        with pytest.raises(ValueError, match="expected"):
            parse_address(wrong)


def test_the_key_is_its_users_alone(folder):
    key = wire.run_key(folder)
    assert len(key) == 32 and wire.run_key(folder) == key and (folder / "engine.key").stat().st_mode & 0o777 == 0o600
    (folder / "engine.key").chmod(0o640)
    with pytest.raises(InputError, match="engine.key: expected a key that its user alone can read .* got mode 640"):
        Engine(engine_config(folder, "127.0.0.1:1"), decode=str).start()


def test_a_silent_machine_is_lost_in_time():
    """The options that the kernels act on, as far as one machine can show them; tests/test_hosts.py pulls the cable."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sock:
        connection = wire.Connection(os.dup(sock.fileno()))
        wire.notice_loss(connection, 20.0)
        user_timeout = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) / 1000
        idle, every = (sock.getsockopt(socket.IPPROTO_TCP, option) for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL))
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1 and idle < user_timeout and user_timeout + every <= 20
        connection.close()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_weights_by_nccl_to_an_engine_of_an_agent(folder, tmp_path):
    """The trainer on the first GPU, the engine on the second. Written for vLLM 0.32; never run."""
    from transformers import LlamaForCausalLM

    from megatron_espo.rollout import push_weights
    from tests import test_rollout as rollout

    rollout.make_llama(tmp_path / "model")
    address = free_address()
    with agent(folder, address, CUDA_VISIBLE_DEVICES="1"):
        config = rollout.engine_config(
            tmp_path / "model", folder / "engine.log", transport="nccl", hosts=(address,), gpu_memory_utilization=0.3, start_timeout_s=300
        )
        with Engine(config, decode=str).start() as engine:
            model = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).cuda()
            for version in (1, 2):
                rollout.perturb(model, seed=version)
                transport = rollout.connect(engine, model, name="nccl")
                push_weights(transport, engine, version)
                transport.shutdown()
            rollout.assert_serves(engine, model.cpu(), atol=1e-3)
        dismiss([address], folder)
