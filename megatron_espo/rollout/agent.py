"""``megatron-espo engine``: runs the engines of a run whose trainer is on other machines, one at a time.

An owner (``rollout.remote``) connects and proves that it knows the run's key; the agent starts ``rollout.server`` and hands it the connection, so
that the owner talks to the engine itself. The agent only watches: when the owner hangs up or its machine is lost, it kills the engine; when
the engine ends, it hangs up. Then it waits for the next owner.
"""

import select
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from pathlib import Path

from megatron_espo.addresses import DEFAULT_PORT, parse_address, show_address
from megatron_espo.errors import InputError
from megatron_espo.rollout import wire
from megatron_espo.rollout.config import EngineConfig
from megatron_espo.rollout.process import signal_group, start_process
from megatron_espo.rollout.versions import differences
from megatron_espo.run_files import read_json

IDLE_EXIT_CODE = 1
_TICK_SECONDS = 0.2
_HEARTBEAT_SECONDS = 10.0


def main(folder: str, listen: str | None, idle_s: float) -> int:
    """Serve until the run is over, a signal comes, or nothing has been heard of the run for ``idle_s`` seconds (exit code 1).

    Call it in the main thread.

    Args:
        folder: the run's, which all hosts share.
        listen: ``host:port``; ``None``: the address of this machine's name.

    Raises:
        InputError: the address is not to be had, or the run's key is not to be trusted.
    """
    try:
        host, port = parse_address(listen or show_address(socket.gethostname(), DEFAULT_PORT))
    except ValueError as error:
        raise InputError(f"--listen: {error}") from None
    Path(folder).mkdir(parents=True, exist_ok=True)
    wire.run_key(folder)
    try:
        server = wire.listen(host, port)
    except OSError as error:
        raise InputError(f"--listen: expected a free address of this machine, got {show_address(host, port)} ({error.strerror})") from None
    if listen is None and server.getsockname()[0].startswith("127."):
        _say(f"warning: {host} is a name that only this machine understands as itself; give --listen an address that the trainer can reach")
    with server:
        return Agent(Path(folder), server).run(idle_s)


class Agent:
    """One engine at a time, for whoever has the run's key.

    Args:
        folder: the run's.
        server: listens already.
    """

    def __init__(self, folder: Path, server: socket.socket) -> None:
        self._folder, self._server = folder, server
        self._address = show_address(*server.getsockname()[:2])
        self._busy = threading.Lock()
        self._owner = ""
        self._end: tuple[int, str] | None = None  # exit code, and why
        self._threads: list[threading.Thread] = []

    def run(self, idle_s: float) -> int:
        """Answer whoever connects until the end; returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: self._finish(0, signal.Signals(number).name))
        _say(f"listens on {self._address} for the run in {self._folder}")
        alive = Sign(self._folder)
        self._server.settimeout(_TICK_SECONDS)
        while self._end is None:
            with suppress(TimeoutError):
                sock, peer = self._server.accept()
                self._threads = [thread for thread in self._threads if thread.is_alive()]
                # Not daemons: an engine dies with the thread that started it.
                self._threads.append(threading.Thread(target=self._answer, args=(sock, peer[0])))
                self._threads[-1].start()
            if self._busy.locked():
                alive.seen()
            elif (silent := alive.silence()) > idle_s:
                self._finish(IDLE_EXIT_CODE, f"no owner and no sign of the run in {self._folder} for {silent:.0f} s (--idle {idle_s:g})")
        for thread in self._threads:
            thread.join()
        code, why = self._end
        _say(f"ends: {why}")
        return code

    def _finish(self, code: int, why: str) -> None:
        self._end = self._end or (code, why)

    def _answer(self, sock: socket.socket, peer: str) -> None:
        try:
            with wire.admit(sock, wire.run_key(self._folder)) as connection:
                request, *arguments = connection.recv()
                if request == "over":
                    self._finish(0, "the run is over")
                else:
                    self._take(connection, *arguments)
        except AuthenticationError:
            _say(f"turned {peer} away, which does not know the key in {self._folder / wire.KEY_FILE}")
        except (EOFError, OSError, InputError) as error:
            _say(f"dropped a connection from {peer}: {error}")

    def _take(self, connection: Connection, theirs: dict[str, str], config: EngineConfig, owner: str) -> None:
        """Run an engine for this owner, or refuse with a word."""
        if not self._busy.acquire(blocking=False):
            connection.send(("refused", f"busy with {self._owner}"))
            return
        try:
            self._owner = owner
            if word := _objection(theirs, config):
                connection.send(("refused", word))
                return
            connection.send(("taken", None))
            wire.notice_loss(connection, config.host_timeout_s)
            with open(self._folder / Path(config.log_path).name, "ab") as log:
                log.write(f"--- {owner}, run by the agent on {self._address}\n".encode())
                log.flush()
                process = start_process(config, connection.fileno(), log)
                _say(f"runs {owner} (process {process.pid})")
                how = self._watch(process, connection)
                log.write(f"--- the engine on {self._address} ended: {how}\n".encode())
            _say(f"is free, {owner} ended: {how}")
        finally:
            # Before the owner sees the connection close, and may come again.
            self._busy.release()

    def _watch(self, process: subprocess.Popen, connection: Connection) -> str:
        """Until the engine or its owner is gone, and the engine with it; how it ended."""
        poll = select.poll()
        poll.register(connection, select.POLLRDHUP)  # errors are reported always; what comes is the engine's to read
        while process.poll() is None:
            if self._end is not None:
                how = self._end[1]
                break
            if poll.poll(_TICK_SECONDS * 1000):
                how = "its owner hung up or was lost"
                break
        else:
            how = f"exit code {process.returncode}"
        signal_group(process, signal.SIGKILL)
        process.wait()
        return how


class Sign:
    """Does the run live? Rank 0's heartbeat in the shared folder changes; clocks of different hosts are not compared."""

    def __init__(self, folder: Path) -> None:
        self._path, self._record = folder / "heartbeats" / "rank0.json", None
        self._looked = self._heard = time.monotonic()

    def seen(self) -> None:
        self._heard = time.monotonic()

    def silence(self) -> float:
        """Seconds since the last sign."""
        now = time.monotonic()
        if now - self._looked > _HEARTBEAT_SECONDS:
            self._looked, last, self._record = now, self._record, read_json(self._path)
            if last is not None and self._record != last:
                self.seen()
        return time.monotonic() - self._heard


def _objection(theirs: dict[str, str], config: EngineConfig) -> str | None:
    """Why an engine could not run here."""
    if found := differences(theirs):
        return f"other versions: {found}"
    if not Path(config.model, "config.json").is_file():
        return f"model.path: no config.json in {config.model} on this machine"
    return None


def _say(text: str) -> None:
    print(f"agent: {text}", flush=True)
