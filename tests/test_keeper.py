"""The keeper of a host and the lease of an owner: who gets a server, and what ends each of them."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from megatron_espo.distributed.addresses import parse_address, show_address
from megatron_espo.errors import InputError
from megatron_espo.files import write_durably
from megatron_espo.rollout import keeper as keeper_module
from megatron_espo.rollout import lease
from megatron_espo.rollout import server as server_module
from megatron_espo.rollout.engine import EngineError, Sampling
from megatron_espo.rollout.http_client import NO_ANSWER, HttpClient, LoopThread, call_once
from megatron_espo.rollout.keeper import Keeper
from megatron_espo.rollout.lease import LeasedServer, host_log_name, settings_text
from megatron_espo.rollout.server import PREFIX, EngineConfig, log_tail, run_key
from megatron_espo.rollout.vllm_engine import VLLMEngine
from tests.support import lease_server
from tests.support.distributed import ROOT
from tests.support.real_engine import is_running, living_in_group, wait_until
from tests.support.tiny import save_tiny_model

SECONDS = 3.0  # lease


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def engine_config(folder: Path, *hosts: str, **changes) -> EngineConfig:
    """Settings of an engine whose model is only a ``config.json``, unless the model exists."""
    model = folder.parent / "model"
    model.mkdir(exist_ok=True)
    if not (model / "config.json").exists():
        (model / "config.json").write_text("{}")
    options = {
        "model": str(model),
        "folder": str(folder),
        "dtype": "float32",
        "transport": "nccl",
        "max_model_len": 64,
        "host_timeout_s": SECONDS,
        "timeout_s": 60.0,
        "hosts": hosts,
    }
    return EngineConfig(**options | changes)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def without_vllm(monkeypatch) -> None:
    """Keepers of this process start ``tests.support.lease_server``."""
    monkeypatch.setattr(server_module, "server_command", lease_server.command)


@contextmanager
def stepping(keeper: Keeper) -> Iterator[Keeper]:
    """A keeper that works in a thread of this process."""
    ended = threading.Event()

    def step() -> None:
        while not ended.wait(0.05):
            keeper.step()

    thread = threading.Thread(target=step)
    thread.start()
    try:
        yield keeper
    finally:
        ended.set()
        thread.join()
        keeper._stop()


def search(config: EngineConfig, hosts: list[str] | None = None) -> LeasedServer:
    """The server that a search for a host finds, or with the attribute ``error``."""
    server = LeasedServer(config, hosts or list(config.hosts))
    server.error = None
    try:
        server.find()
    except EngineError as error:
        server.error = error
    return server


@pytest.fixture
def output(capfd):
    """A function that returns what keepers printed so far."""
    texts = []

    def read() -> str:
        texts.append(capfd.readouterr().out)
        return "".join(texts)

    return read


# -- owners and leases -----------------------------------------------------------------------------


def test_one_owner_at_a_time_and_a_released_server_ends(folder, without_vllm, output):
    address = free_address()
    with stepping(Keeper(folder, address, 600)) as keeper:
        owner = search(engine_config(folder, address))
        assert owner.address == address and owner.is_alive
        pid = keeper._server.pid
        changes = {"log_name": "engine-rank1.log", "timeout_s": 0.5}
        second = search(engine_config(folder, address, **changes))
        assert second.error.final and not second.address
        message = (
            f"within 0.5 s (rollout.timeout_s): {address}: {PREFIX}/lease: 409 owned by engine"
        )
        assert message in str(second.error)
        second.kill()
        time.sleep(SECONDS + 1)  # the lease is renewed
        assert owner.is_alive and is_running(pid)
        owner.kill()
        wait_until(lambda: not is_running(pid), "the server ends", 5)
        # The same host gives a new server to another owner.
        third = search(engine_config(folder, address))
        assert third.is_alive and keeper._server.pid != pid
        third.kill()
        third.kill()
    assert "the server ended with exit code -9; the next one starts in 0 s" in output()


def test_a_server_whose_owner_is_gone_ends_in_time(folder, without_vllm):
    address = free_address()
    with stepping(Keeper(folder, address, 600)) as keeper:
        owner = search(engine_config(folder, address))
        pid = keeper._server.pid
        owner._closed.set()  # a killed owner neither renews nor releases the lease
        began = time.monotonic()
        wait_until(lambda: not is_running(pid), "the server ends")
        assert SECONDS - 1.5 < time.monotonic() - began < SECONDS + 15
        is_new = lambda: keeper._server is not None and keeper._server.pid != pid  # noqa: E731
        wait_until(is_new, "a new server")


def test_an_owner_notices_that_its_server_is_another_one(folder, without_vllm):
    """The keeper's new server must not renew the lease of the old one: its weights differ."""
    address = free_address()
    (folder / host_log_name(address)).write_text("MemoryError: of an earlier server")
    with stepping(Keeper(folder, address, 600)) as keeper:
        owner = search(engine_config(folder, address))
        assert "MemoryError" not in log_tail(owner.log_path, owner.log_start)
        os.kill(keeper._server.pid, signal.SIGKILL)
        wait_until(lambda: not owner.is_alive, "the owner notices", 30)
        key = run_key(folder)
        wait_until(lambda: answers(address, key), "a new server")
        assert call_once(address, key, f"{PREFIX}/info")["owner"] == ""
        with pytest.raises(EngineError, match="503 this server has served no weights yet"):
            call_once(address, key, "/v1/completions", {})


def answers(address: str, key: str) -> bool:
    try:
        return bool(call_once(address, key, f"{PREFIX}/info"))
    except NO_ANSWER:
        return False


def test_a_silent_host_is_given_up_and_the_next_one_taken(folder, without_vllm):
    first, spare = free_address(), free_address()
    config = engine_config(folder, first, spare)
    hosts = [first, spare]
    with stepping(Keeper(folder, spare, 600)):
        with stepping(Keeper(folder, first, 600)) as other:
            owner = search(config, hosts)
            while owner.address != first:  # either server may be ready first
                owner.kill()
                owner = search(config, hosts)
            pid = other._server.pid
            os.kill(pid, signal.SIGSTOP)
            began = time.monotonic()
            wait_until(lambda: not owner.is_alive, "the owner notices", 30)
            assert SECONDS - 1.5 < time.monotonic() - began < SECONDS + 15
            owner.kill()
            assert hosts == [spare, first]
            owner = search(config, hosts)
            assert owner.address == spare and owner.is_alive
            wait_until(lambda: not is_running(pid), "the keeper kills the stopped server", 30)
        owner.kill()
    # No host is left, and the error names all of them. A host that refuses connections may be
    # starting a server.
    began = time.monotonic()
    owner = search(replace(config, timeout_s=1.0), hosts)
    assert time.monotonic() - began < 30 and owner.error.final
    text, log = str(owner.error), folder / host_log_name(spare)
    assert f"within 1 s (rollout.timeout_s): {first}: no answer (Connection refused)" in text
    assert f"{spare}: no answer (Connection refused); its server's output is in {log}" in text


def test_a_lost_machine_has_the_shorter_limit(folder, monkeypatch):
    """The kernel of a running machine refuses a connection; a lost machine does not answer."""

    def call(*_):
        raise OSError(errno.EHOSTUNREACH, "No route to host")

    monkeypatch.setattr(lease, "call_once", call)
    config = engine_config(folder, "192.0.2.1:7700", host_timeout_s=0.5)
    owner = search(config, ["192.0.2.1:7700"])
    message = "within 0.5 s (rollout.host_timeout_s): 192.0.2.1:7700: no answer (No route to host)"
    assert message in str(owner.error)


def test_another_key_is_told_at_once(folder, without_vllm, tmp_path):
    address, other = free_address(), tmp_path / "other"
    other.mkdir()
    (other / "engine.json").write_text(settings_text(engine_config(folder)))
    with stepping(Keeper(other, address, 600)):
        wait_until(lambda: answers(address, run_key(other)), "a server")
        began = time.monotonic()
        owner = search(engine_config(folder, address))
        assert time.monotonic() - began < 20 and owner.error.final
        text = str(owner.error)
        assert f"{address}: it has another key than {folder}/engine.key" in text
        assert "within" not in text


def test_the_error_names_different_settings(folder, without_vllm, monkeypatch):
    address = free_address()
    (folder / "engine.json").write_text(settings_text(engine_config(folder)))
    keeper = Keeper(folder, address, 600)
    keeper.step()  # once: it does not see the changed settings
    try:
        wait_until(lambda: answers(address, run_key(folder)), "a server")
        changes = {
            "dtype": "bfloat16",
            "transport": "files",
            "max_model_len": 32,
            "model": "/nowhere",
            "tensor_parallel_size": 2,
            "sleep": True,
        }
        config = engine_config(folder, address, timeout_s=0.1, **changes)
        versions = {"vllm": "0.1", "torch": "9"}
        monkeypatch.setattr(lease, "package_versions", lambda: versions)
        text = str(search(config).error)
        for name, value in (changes | versions).items():
            assert f"{name}: expected {value}, got" in text, name
    finally:
        keeper._stop()


def test_the_key_is_its_users_alone(folder):
    run_key(folder)
    (folder / "engine.key").chmod(0o640)
    message = "engine.key: expected a key that only its user can read .* got mode 640"
    with pytest.raises(InputError, match=message):
        search(engine_config(folder, "127.0.0.1:1"))


# -- lifetime of the keeper ------------------------------------------------------------------------


class FakeServer:
    """A server process without a process."""

    started: list["FakeServer"] = []

    def __init__(self, config: EngineConfig) -> None:
        self.config, self.is_alive, self.returncode = config, True, None
        self.pid = len(self.started)
        self.started.append(self)

    def end(self, code: int) -> None:
        self.is_alive, self.returncode = False, code

    def kill(self) -> None:
        self.is_alive = False


@pytest.fixture
def fake(monkeypatch):
    """``(servers, clock, info)``: started servers, the keeper's clock, and the servers' answer."""
    FakeServer.started = []
    clock, info = [1000.0], {"owner": ""}
    monkeypatch.setattr(keeper_module, "ServerProcess", FakeServer)
    monkeypatch.setattr(keeper_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def answer(address, key, path):
        if info.get("silent"):
            raise ConnectionRefusedError
        return info

    monkeypatch.setattr(keeper_module, "call_once", answer)
    return FakeServer.started, clock, info


def test_a_server_is_started_and_restarted(folder, fake):
    servers, clock, info = fake
    keeper = Keeper(folder, "10.0.0.5:7700", 600)
    keeper.step()
    assert not servers, "the trainer has not written engine.json yet"
    (folder / "engine.json").write_text(
        settings_text(engine_config(folder, "10.0.0.5:7700", visible_devices="3"))
    )
    info["silent"] = True
    keeper.step()
    assert len(servers) == 1
    config = servers[0].config
    assert config.listen == "10.0.0.5:7700" and config.folder == str(folder)
    assert config.log_name == "engine-10.0.0.5-7700.log"
    assert config.visible_devices is None and config.hosts == ()
    # A server that never answered restarts after a pause.
    for _ in range(3):
        servers[-1].end(1)
        count = len(servers)
        keeper.step()
        clock[0] += 9.5
        keeper.step()
        assert len(servers) == count
        clock[0] += 1
        keeper.step()
        assert len(servers) == count + 1
    # A server that has answered restarts at once.
    info["silent"] = False
    keeper.step()
    servers[-1].end(-9)
    count = len(servers)
    keeper.step()
    keeper.step()
    assert len(servers) == count + 1
    # Changed settings restart the server at once.
    (folder / "engine.json").write_text(settings_text(engine_config(folder, dtype="bfloat16")))
    keeper.step()
    keeper.step()
    assert len(servers) == count + 2 and not servers[-2].is_alive
    assert servers[-1].config.dtype == "bfloat16"
    # A server that stopped answering is killed.
    keeper.step()
    info["silent"] = True
    clock[0] += SECONDS - 1
    keeper.step()
    assert servers[-1].is_alive
    clock[0] += 2
    keeper.step()
    assert not servers[-1].is_alive


def test_the_keeper_ends_with_the_run(folder, fake):
    (folder / "status.json").write_text('{"state": "done"}')  # of an earlier job of the run
    keeper = Keeper(folder, "10.0.0.5:7700", 600)
    for state in ("running", "requeue", "failed"):
        keeper.step()
        (folder / "status.json").write_text(f'{{"state": "{state}"}}')
        keeper.step()
        assert keeper.end is None, state
    (folder / "status.json").write_text('{"state": "done"}')
    keeper.step()
    assert keeper.end == (0, "the run is over")


def test_a_rewritten_status_ends_the_keeper(folder, fake):
    """The keeper may miss the short time in which the status is ``running``."""
    (folder / "status.json").write_text('{"state": "done"}')
    keeper = Keeper(folder, "10.0.0.5:7700", 600)
    os.utime(folder / "status.json", ns=(1, 1))
    keeper.step()
    assert keeper.end == (0, "the run is over")


def test_an_idle_keeper_ends(folder, fake):
    servers, clock, info = fake
    (folder / "heartbeats").mkdir()
    heartbeat = folder / "heartbeats" / "rank0.json"
    heartbeat.write_text('{"count": 7}')  # of a run that has ended
    keeper = Keeper(folder, "10.0.0.5:7700", 100)
    for count in range(3):
        clock[0] += 99
        keeper.step()
        assert keeper.end is None
        heartbeat.write_text(f'{{"count": {count}}}')
        keeper.step()
    # An owner keeps the keeper running; a server without an owner does not.
    (folder / "engine.json").write_text(settings_text(engine_config(folder)))
    info["owner"] = "engine of node3"
    for _ in range(3):
        clock[0] += 99
        keeper.step()
        keeper.step()
        assert keeper.end is None
    info["owner"] = ""
    clock[0] += 101
    keeper.step()
    reason = f"no owner and no heartbeat of the run in {folder} for 101 s (--idle 100)"
    assert keeper.end == (1, reason)


def test_settings_of_another_version_are_an_error(folder, fake):
    (folder / "engine.json").write_text('{"modell": "x"}')
    message = "engine.json: expected engine settings of this package's version, got"
    with pytest.raises(InputError, match=message):
        Keeper(folder, "10.0.0.5:7700", 600).step()


def test_settings_are_common_to_all_owners(folder):
    one = engine_config(folder, "a:1", "b:1", log_name="engine.log")
    other = engine_config(folder, "b:1", "a:1", log_name="engine-rank8.log", visible_devices="3")
    assert settings_text(one) == settings_text(other) != settings_text(replace(one, sleep=True))
    stats = []
    for config in (one, other):
        LeasedServer(replace(config, timeout_s=0.1), ["127.0.0.1:1"]).kill()
        stats.append((folder / "engine.json").stat())
    assert stats[0].st_ino == stats[1].st_ino, "equal settings are not written again"


def test_owners_on_several_hosts_write_a_file_at_the_same_time(tmp_path):
    """They may have equal process ids."""
    path = tmp_path / "engine.json"
    with ThreadPoolExecutor(2) as executor:
        for i in range(50):
            list(executor.map(write_durably, [path] * 2, [str(i)] * 2))
            assert path.read_text() == str(i)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("address, message", [
    ("0.0.0.0:7700", "expected the address of one machine"),
    ("localhost", "expected host:port"),
    ("192.0.2.1:7700", "expected a free address of this machine, got 192.0.2.1:7700"),
])  # fmt: skip
def test_an_address_that_cannot_be_used_is_an_error(folder, capsys, address, message):
    from megatron_espo import cli

    assert cli.main(["serve", str(folder), "--listen", address]) == 2
    assert f"error: --listen: {message}" in capsys.readouterr().err


def test_addresses_are_read_as_they_are_shown():
    for host, port in (("10.0.0.5", 7700), ("node-9.cluster", 1), ("fe80::1", 65535)):
        assert parse_address(show_address(host, port)) == (host, port)
    wrong_ports = ("node9", "node9:", "node9:0", "node9:65536")
    for wrong in (*wrong_ports, "::1:7700", "a b:1", "[::]:7700", "http://node9:1"):
        with pytest.raises(ValueError, match="expected"):
            parse_address(wrong)


# -- the command, with vLLM ------------------------------------------------------------------------


@contextmanager
def serving(folder: Path, address: str, *options: str) -> Iterator[subprocess.Popen]:
    """``megatron-espo serve`` as a process; ``output()`` returns what it printed."""
    log = folder.parent / f"{address.rpartition(':')[2]}.out"
    command = [sys.executable, "-m", "megatron_espo", "serve", str(folder), "--listen", address]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, *options], cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT
        )
    process.output = log.read_text
    try:
        is_up = lambda: "keeps a server" in log.read_text()  # noqa: E731
        wait_until(lambda: is_up() or process.poll() is not None, "the keeper starts")
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(30)


def server_pid(output: str) -> int:
    return int(output.rpartition("(process ")[2].partition(")")[0])


OWNER = """
import time
from megatron_espo.rollout.lease import LeasedServer
from megatron_espo.rollout.server import EngineConfig
config = {config!r}
server = LeasedServer(config, list(config.hosts))
server.find()
print("leased", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_keeper_of_vllm_serves_one_owner_after_the_other(folder):
    """The server and its workers end when they are released, and with their owner or keeper."""
    save_tiny_model(folder.parent / "model")
    address, loop = free_address(), LoopThread()
    config = engine_config(
        folder,
        address,
        timeout_s=200.0,
        tensor_parallel_size=2,
        transport="",
        load_weights=True,
        engine_args={"kv_cache_memory_bytes": 1 << 26},
    )
    with serving(folder, address) as process:
        engine = VLLMEngine(config, loop)
        engine.start()
        engine.wait_ready()
        assert engine.address == address and engine.state == "running"
        first = server_pid(process.output())
        assert len(living_in_group(first)) > 1, "it has workers"
        client, stranger = HttpClient(address, run_key(folder)), HttpClient(address, "0" * 64)
        answer = loop.run(client.generate("a", [1, 4, 5], Sampling(4, seed=1)), 60)
        assert len(answer.token_ids) == 4
        assert (answer.versions == 0).all() and (answer.logprobs < 0).all()
        with pytest.raises(EngineError, match="401 expected the run's key"):
            loop.run(stranger.generate("a", [1, 4, 5], Sampling(4, seed=1)), 60)
        time.sleep(SECONDS + 2)  # the lease is renewed
        engine._worker("ping")
        engine.close()
        wait_until(lambda: not living_in_group(first), "the released server ends", 10)
        killed = subprocess.Popen(
            [sys.executable, "-c", OWNER.format(config=config)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert killed.stdout.readline() == "leased\n"
        second = server_pid(process.output())
        assert second != first and len(living_in_group(second)) > 1
        killed.kill()
        killed.wait()
        ended = lambda: not living_in_group(second)  # noqa: E731
        wait_until(ended, "the server of a killed owner ends", SECONDS + 4)
        engine.start()
        engine.wait_ready()
        third = server_pid(process.output())
        process.kill()
        wait_until(lambda: not living_in_group(third), "the server of a killed keeper ends", 10)
        with pytest.raises(EngineError, match=f"the rollout engine on {address} is out of reach"):
            engine._worker("ping")
        assert engine.state == "dead" and not Path(folder, "engine.log").exists()
    for opened in (client, stranger):
        loop.run(opened.close(), 5)
    loop.close()


@pytest.mark.slow
def test_a_keeper_ends_on_a_signal_and_when_the_run_is_over(folder):
    """While vLLM's server starts."""
    save_tiny_model(folder.parent / "model")
    (folder / "engine.json").write_text(
        settings_text(engine_config(folder, transport="", load_weights=True))
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        with serving(folder, free_address()) as process:
            wait_until(lambda: "started a server" in process.output(), "a server")
            pid = server_pid(process.output())
            process.send_signal(number)
            assert process.wait(20) == 0 and not living_in_group(pid)
            assert process.output().endswith(f"keeper: ends: {number.name}\n")
    with serving(folder, free_address()) as process:
        (folder / "status.json").write_text('{"state": "done", "why": null}')
        assert process.wait(30) == 0
        assert process.output().endswith("keeper: ends: the run is over\n")
    with serving(folder, free_address(), "--idle", "2") as process:
        assert process.wait(30) == 1
        assert "ends: no owner and no heartbeat of the run" in process.output()
