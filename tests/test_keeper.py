"""The keeper of a host and the lease of an owner: who gets a server, what ends it, and when the keeper ends."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from megatron_espo.addresses import parse_address, show_address
from megatron_espo.errors import InputError
from megatron_espo.rollout import keeper as keeper_module
from megatron_espo.rollout import server as server_module
from megatron_espo.rollout.engine import EngineError, Sampling
from megatron_espo.rollout.http_client import HttpClient, LoopThread
from megatron_espo.rollout.keeper import Keeper
from megatron_espo.rollout.remote import RemoteServer, RemoteServers, ask, host_log_name, settings_text
from megatron_espo.rollout.server import EngineConfig, read_key, run_key_file
from megatron_espo.rollout.vllm_engine import VLLMEngine
from tests import lease_server
from tests.distributed import ROOT
from tests.tiny import save_tiny_model

SECONDS = 5.0


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def until(condition, what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def engine_config(folder: Path, *hosts: str, **changes) -> EngineConfig:
    """Settings with a model of no more than a ``config.json``, unless there is one already."""
    model = folder.parent / "model"
    model.mkdir(exist_ok=True)
    if not (model / "config.json").exists():
        (model / "config.json").write_text("{}")
    options = {"dtype": "float32", "transport": "nccl", "max_model_len": 64, "host_timeout_s": SECONDS}
    options |= {"model": str(model), "start_timeout_s": 60.0}
    return EngineConfig(**options | {"folder": str(folder), "hosts": hosts} | changes)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def without_vllm(monkeypatch) -> None:
    """Keepers of this process start ``tests.lease_server``."""
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


def found(server: RemoteServer) -> RemoteServer:
    until(lambda: server.address or not server.is_alive, "a host is found or none")
    return server


@pytest.fixture
def words(capfd):
    """A function that returns what keepers said so far."""
    said = []

    def read() -> str:
        said.append(capfd.readouterr().out)
        return "".join(said)

    return read


# -- owners and leases --------------------------------------------------------------------------------------------------


def test_one_owner_at_a_time_and_a_released_server_ends(folder, without_vllm, words, caplog):
    address = free_address()
    with stepping(Keeper(folder, address, 600)) as keeper:
        owner = found(RemoteServers(engine_config(folder, address)).start())
        assert owner.address == address and owner.is_alive and owner.pid is None
        pid = keeper._server.pid
        second = RemoteServers(engine_config(folder, address, log_name="engine-rank1.log", start_timeout_s=1.0)).start()
        found(second)
        assert not second.is_alive and second.final and second.address is None
        assert f"within 1 s (rollout.timeout_s): {address}: owned by engine of {socket.gethostname()}" in str(second.error)
        second.kill()
        time.sleep(SECONDS + 2)  # the lease is renewed
        assert owner.is_alive and lives(pid)
        owner.kill()
        until(lambda: not lives(pid), "the server ends", 5)
        # The same hosts give a fresh server to another owner.
        third = found(RemoteServers(engine_config(folder, address)).start())
        assert third.is_alive and keeper._server.pid != pid
        third.kill()
        third.kill()
    assert "the server ended with exit code -9; the next one starts in 0 s" in words()


def test_a_server_whose_owner_is_gone_ends_in_time(folder, without_vllm):
    address = free_address()
    with stepping(Keeper(folder, address, 600)) as keeper:
        owner = found(RemoteServers(engine_config(folder, address)).start())
        pid = keeper._server.pid
        owner._closed.set()  # as a killed owner: no renewal, no release
        began = time.monotonic()
        until(lambda: not lives(pid), "the server ends")
        assert SECONDS - 2 < time.monotonic() - began < SECONDS + 4
        until(lambda: keeper._server is not None and keeper._server.pid != pid, "a fresh server")


def test_an_owner_notices_that_its_server_is_another_one(folder, without_vllm):
    """The fresh server of a keeper must not renew the lease of the old one: it has other weights."""
    address = free_address()
    with stepping(Keeper(folder, address, 600)) as keeper:
        owner = found(RemoteServers(engine_config(folder, address)).start())
        os.kill(keeper._server.pid, signal.SIGKILL)
        until(lambda: not owner.is_alive, "the owner notices", 30)
        assert not owner.final and owner.error is None
        key = read_key(run_key_file(folder))
        until(lambda: answers(address, key), "a fresh server")
        assert ask(address, key, "/info")[1]["owner"] == ""
        assert ask(address, key, "/generate", {}) == (503, {"error": "this server has served no weights yet"})


def answers(address: str, key: str) -> bool:
    try:
        return ask(address, key, "/info")[0] == 200
    except OSError:
        return False


def test_a_silent_host_is_given_up_and_the_next_one_taken(folder, without_vllm):
    first, spare = free_address(), free_address()
    hosts = RemoteServers(engine_config(folder, first, spare))
    with stepping(Keeper(folder, spare, 600)):
        with stepping(Keeper(folder, first, 600)) as other:
            owner = found(hosts.start())
            while owner.address != first:  # whichever server was ready first
                owner.kill()
                owner = found(hosts.start())
            pid = other._server.pid
            os.kill(pid, signal.SIGSTOP)
            began = time.monotonic()
            until(lambda: not owner.is_alive, "the owner notices", 30)
            assert SECONDS - 2 < time.monotonic() - began < SECONDS + 4
            owner.kill()
            assert hosts.order == [spare, first]
            owner = found(hosts.start())
            assert owner.address == spare and owner.is_alive
            # The keeper kills the server that gives no answer.
            until(lambda: not lives(pid), "the stopped server is killed", 30)
        owner.kill()
    # Nobody is left: every host is named. A machine that refuses connections may be starting a server.
    hosts.config = replace(hosts.config, start_timeout_s=2.0)
    began = time.monotonic()
    owner = found(hosts.start())
    assert time.monotonic() - began < 10 and owner.final
    log = folder / host_log_name(spare)
    assert f"within 2 s (rollout.timeout_s): {first}: no answer (Connection refused)" in str(owner.error)
    assert f"{spare}: no answer (Connection refused); its server's output is in {log}" in str(owner.error)


def test_a_lost_machine_has_the_shorter_limit(folder, monkeypatch):
    """Nothing refuses the connection, as the kernel of a machine that runs does."""

    def ask(*_):
        raise OSError(errno.EHOSTUNREACH, "No route to host")

    monkeypatch.setattr("megatron_espo.rollout.remote.ask", ask)
    hosts = RemoteServers(engine_config(folder, "192.0.2.1:7700", host_timeout_s=1.0))
    hosts.started = True
    owner = found(hosts.start())
    assert "within 1 s (rollout.host_timeout_s): 192.0.2.1:7700: no answer (No route to host)" in str(owner.error)


def test_another_key_is_told_at_once(folder, without_vllm, tmp_path):
    address = free_address()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "engine.json").write_text(settings_text(engine_config(folder)))
    key = read_key(run_key_file(tmp_path / "other"))
    with stepping(Keeper(tmp_path / "other", address, 600)):
        until(lambda: answers(address, key), "a server")
        began = time.monotonic()
        owner = found(RemoteServers(engine_config(folder, address)).start())
        assert time.monotonic() - began < 5 and owner.final
        assert f"{address}: it has another key than {folder}/engine.key" in str(owner.error) and "within" not in str(owner.error)


def test_differences_are_named(folder, without_vllm, monkeypatch):
    address = free_address()
    (folder / "engine.json").write_text(settings_text(engine_config(folder)))
    key = read_key(run_key_file(folder))
    keeper = Keeper(folder, address, 600)
    keeper.step()  # one only: it does not notice the new settings
    try:
        until(lambda: answers(address, key), "a server")
        changes = {"dtype": "bfloat16", "transport": "files", "max_model_len": 32, "model": "/nowhere", "tensor_parallel_size": 2}
        for name, value in changes.items():
            config = engine_config(folder, address, start_timeout_s=0.1, **{name: value})
            owner = found(RemoteServers(config).start())
            assert f"{name}: expected {value}, got" in str(owner.error) and "settings: expected" in str(owner.error), name
        # Settings that /info does not show.
        owner = found(RemoteServers(engine_config(folder, address, start_timeout_s=0.1, sleep=True)).start())
        assert "settings: expected" in str(owner.error)
        monkeypatch.setattr("megatron_espo.rollout.remote.package_versions", lambda: {"vllm": "0.1", "torch": "9"})
        owner = found(RemoteServers(engine_config(folder, address, start_timeout_s=0.1)).start())
        assert "vllm: expected 0.1, got" in str(owner.error) and "torch: expected 9, got" in str(owner.error)
    finally:
        keeper._stop()


def test_the_key_is_its_users_alone(folder):
    run_key_file(folder).chmod(0o640)
    with pytest.raises(InputError, match="engine.key: expected a key that only its user can read .* got mode 640"):
        RemoteServers(engine_config(folder, "127.0.0.1:1")).start()


# -- the keeper's life --------------------------------------------------------------------------------------------------


class FakeServer:
    """A server process without a process."""

    started: list["FakeServer"] = []

    def __init__(self, config: EngineConfig, is_cpu: bool, environment: dict[str, str]) -> None:
        self.config, self.is_alive, self.returncode, self.pid = config, True, None, len(self.started)
        self.started.append(self)

    def end(self, code: int) -> None:
        self.is_alive, self.returncode = False, code

    def kill(self) -> None:
        self.is_alive = False


@pytest.fixture
def fake(monkeypatch):
    """``(servers, clock, info)``: servers that were started, the keeper's time, and what a server answers (``None``: nothing)."""
    FakeServer.started = []
    clock, info = [1000.0], {}
    monkeypatch.setattr(keeper_module, "ServerProcess", FakeServer)
    monkeypatch.setattr(keeper_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def answer(address, key, path):
        if info.get("silent"):
            raise ConnectionRefusedError
        return 200, info

    monkeypatch.setattr(keeper_module, "ask", answer)
    return FakeServer.started, clock, info


def test_a_server_is_started_and_restarted(folder, fake):
    servers, clock, info = fake
    keeper = Keeper(folder, "10.0.0.5:7700", 600)
    keeper.step()
    assert not servers, "the trainer has not written engine.json yet"
    (folder / "engine.json").write_text(settings_text(engine_config(folder, "10.0.0.5:7700", visible_devices="3")))
    info["silent"] = True
    keeper.step()
    assert len(servers) == 1
    config = servers[0].config
    assert (config.listen, config.log_name, config.folder) == ("10.0.0.5:7700", "engine-10.0.0.5-7700.log", str(folder))
    assert config.visible_devices is None and config.hosts == ()
    # One that never answers is started again after longer and longer pauses.
    for pause in (1, 2, 4, 8, 16, 32, 60, 60):
        servers[-1].end(1)
        count = len(servers)
        keeper.step()
        clock[0] += pause - 0.5
        keeper.step()
        assert len(servers) == count
        clock[0] += 1
        keeper.step()
        assert len(servers) == count + 1
    # One that has answered is started again at once.
    info["silent"] = False
    keeper.step()
    servers[-1].end(-9)
    count = len(servers)
    keeper.step()
    keeper.step()
    assert len(servers) == count + 1
    # Other settings, at once.
    (folder / "engine.json").write_text(settings_text(engine_config(folder, dtype="bfloat16")))
    keeper.step()
    keeper.step()
    assert len(servers) == count + 2 and not servers[-2].is_alive and servers[-1].config.dtype == "bfloat16"
    # One that answered and answers no more is killed.
    keeper.step()
    info["silent"] = True
    clock[0] += SECONDS - 1
    keeper.step()
    assert servers[-1].is_alive
    clock[0] += 2
    keeper.step()
    assert not servers[-1].is_alive


def test_the_keeper_ends_with_the_run(folder, fake):
    (folder / "status.json").write_text('{"state": "done"}')  # of an earlier part of the run
    keeper = Keeper(folder, "10.0.0.5:7700", 600)
    for state in ("running", "requeue", "failed"):
        keeper.step()
        (folder / "status.json").write_text(f'{{"state": "{state}"}}')
        keeper.step()
        assert keeper.end is None, state
    (folder / "status.json").write_text('{"state": "done"}')
    keeper.step()
    assert keeper.end == (0, "the run is over")


def test_a_run_that_is_done_twice_is_seen(folder, fake):
    """The keeper may miss the short time in which the file says ``running``."""
    (folder / "status.json").write_text('{"state": "done"}')
    keeper = Keeper(folder, "10.0.0.5:7700", 600)
    os.utime(folder / "status.json", ns=(1, 1))
    keeper.step()
    assert keeper.end == (0, "the run is over")


def test_a_keeper_that_nobody_needs_ends(folder, fake):
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
    # An owner is a sign of the run too; a server without one is not.
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
    assert keeper.end == (1, f"no owner and no heartbeat of the run in {folder} for 101 s (--idle 100)")


def test_settings_of_another_version_are_an_error(folder, fake):
    (folder / "engine.json").write_text('{"modell": "x"}')
    with pytest.raises(InputError, match="engine.json: expected the settings of an engine of this package's version, got"):
        Keeper(folder, "10.0.0.5:7700", 600).step()


def test_settings_are_common_to_all_owners(folder):
    one = engine_config(folder, "a:1", "b:1", log_name="engine.log")
    other = engine_config(folder, "b:1", "a:1", log_name="engine-rank8.log", visible_devices="3")
    assert settings_text(one) == settings_text(other) != settings_text(replace(one, sleep=True))
    RemoteServers(replace(one, start_timeout_s=0.1)).start().kill()
    before = (folder / "engine.json").stat()
    RemoteServers(replace(other, start_timeout_s=0.1)).start().kill()
    after = (folder / "engine.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns), "written again without a difference"


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
    for wrong in ("node9", "node9:", "node9:0", "node9:65536", "::1:7700", "a b:1", "[::]:7700", "http://node9:1"):
        with pytest.raises(ValueError, match="expected"):
            parse_address(wrong)


def test_the_command_is_printed(folder, capsys):
    from megatron_espo import cli

    assert cli.main(["serve", str(folder), "--listen", "10.0.0.5:7700", "--print"]) == 2
    assert "engine.json: no such file; the trainer writes it when it starts" in capsys.readouterr().err
    (folder / "engine.json").write_text(settings_text(engine_config(folder, engine_args={"max_num_seqs": 3})))
    assert cli.main(["serve", str(folder), "--listen", "10.0.0.5:7700", "--print"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("env ") and "--host 10.0.0.5 --port 7700" in text and "--max-num-seqs 3" in text
    assert f"MEGATRON_ESPO_KEY_FILE={folder}/engine.key" in text and read_key(run_key_file(folder)) not in text


# -- the command, with vLLM ---------------------------------------------------------------------------------------------


@contextmanager
def serving(folder: Path, address: str, *options: str) -> Iterator[subprocess.Popen]:
    """``megatron-espo serve`` as a process; ``words()`` returns its output."""
    log = folder.parent / f"{address.rpartition(':')[2]}.out"
    command = [sys.executable, "-m", "megatron_espo", "serve", str(folder), "--listen", address, *options]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("w") as out:
        env = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT)
    process.words = log.read_text
    try:
        until(lambda: "keeps a server" in process.words() or process.poll() is not None, "the keeper starts")
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(30)


def server_pid(words: str) -> int:
    return int(words.rpartition("(process ")[2].partition(")")[0])


def processes_of(pid: int) -> list[int]:
    """The living processes of the server's group."""
    found = subprocess.run(["ps", "-o", "pid=,stat=", "-g", str(pid)], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if line.split()[1][0] not in "ZX"]


OWNER = """
import time
from megatron_espo.rollout.remote import RemoteServers
from megatron_espo.rollout.server import EngineConfig
server = RemoteServers({config!r}).start()
while server.address is None:
    assert server.is_alive, server.error
    time.sleep(0.1)
print("leased", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_keeper_of_vllm_serves_one_owner_after_the_other(folder):
    """Released, its owner killed, itself killed: the server and its workers end each time."""
    save_tiny_model(folder.parent / "model")
    address, loop = free_address(), LoopThread()
    config = engine_config(folder, address, start_timeout_s=200.0, tensor_parallel_size=2, load_weights=True)
    config = replace(config, engine_args={"kv_cache_memory_bytes": 1 << 26})
    with serving(folder, address) as process:
        engine = VLLMEngine(config, loop)
        engine.start()
        engine.wait_ready()
        assert engine.address == address and engine.state == "ready" and engine.pid is None
        first = server_pid(process.words())
        assert len(processes_of(first)) > 1, "workers of their own"
        client = HttpClient(address, read_key(run_key_file(folder)))
        answer = loop.run(client.generate("a", [1, 4, 5], Sampling(4, seed=1)), 60)
        assert len(answer.token_ids) == 4 and (answer.versions == 0).all() and (answer.logprobs < 0).all()
        with pytest.raises(EngineError, match="401 expected the run's key"):
            loop.run(HttpClient(address, "0" * 64).generate("a", [1, 4, 5], Sampling(4, seed=1)), 60)
        time.sleep(SECONDS + 2)  # the lease is renewed
        engine.check_health()
        engine.close()
        until(lambda: not processes_of(first), "the released server and its workers end", 10)
        # Another owner, which is killed.
        killed = subprocess.Popen(
            [sys.executable, "-c", OWNER.format(config=config)],
            env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert killed.stdout.readline() == "leased\n"
        second = server_pid(process.words())
        assert second != first and len(processes_of(second)) > 1
        killed.kill()
        killed.wait()
        until(lambda: not processes_of(second), "the server of a killed owner ends", SECONDS + 4)
        # The keeper is killed while its server has an owner.
        engine.start()
        engine.wait_ready()
        third = server_pid(process.words())
        process.kill()
        until(lambda: not processes_of(third), "the server of a killed keeper ends", 10)
        with pytest.raises(EngineError, match=f"the rollout engine on {address} is out of reach"):
            engine.check_health()
        assert engine.state == "dead" and not Path(folder, "engine.log").exists()
    loop.run(client.close(), 5)
    loop.close()


@pytest.mark.slow
def test_a_keeper_ends_on_a_signal_and_when_the_run_is_over(folder):
    """The command, with vLLM's server while it starts."""
    save_tiny_model(folder.parent / "model")
    (folder / "engine.json").write_text(settings_text(engine_config(folder, load_weights=True)))
    for number in (signal.SIGTERM, signal.SIGINT):
        with serving(folder, free_address()) as process:
            until(lambda: "started a server" in process.words(), "a server")
            pid = server_pid(process.words())
            process.send_signal(number)
            assert process.wait(20) == 0 and not processes_of(pid)
            assert process.words().endswith(f"keeper: ends: {number.name}\n")
    with serving(folder, free_address()) as process:
        (folder / "status.json").write_text('{"state": "done", "why": null}')
        assert process.wait(30) == 0 and process.words().endswith("keeper: ends: the run is over\n")
    with serving(folder, free_address(), "--idle", "2") as process:
        assert process.wait(30) == 1 and "ends: no owner and no heartbeat of the run" in process.words()
