"""``megatron-espo serve``: keeps one vLLM server running on a machine without trainer ranks."""

import json
import signal
import socket
import time
from pathlib import Path

from megatron_espo.distributed.addresses import DEFAULT_PORT, parse_address, show_address
from megatron_espo.errors import InputError
from megatron_espo.files import read_json
from megatron_espo.rollout.engine import EngineError
from megatron_espo.rollout.http_client import NO_ANSWER, call_once
from megatron_espo.rollout.lease import SETTINGS_FILE, host_log_name
from megatron_espo.rollout.server import PREFIX, EngineConfig, ServerProcess, run_key

IDLE_EXIT_CODE = 1
_TICK_SECONDS = 1.0
_PAUSE_SECONDS = 10.0  # after the end of a server that never answered


def main(folder: str, listen: str | None, idle_s: float) -> int:
    """Keep a server running until the run is done or idle, or a signal arrives.

    Call it in the main thread.

    Args:
        folder: of the run; all hosts share it.
        listen: ``host:port``; ``None``: the address of this machine's name.
        idle_s: limit without an owner and without a heartbeat of the run.

    Returns:
        Exit code: 0, or 1 after ``idle_s``.

    Raises:
        InputError: the address cannot be used, other users may read the run's key, or
            ``engine.json`` is not valid.
    """
    try:
        host, port = parse_address(listen or show_address(socket.gethostname(), DEFAULT_PORT))
    except ValueError as error:
        raise InputError(f"--listen: {error}") from None
    path, address = Path(folder).absolute(), show_address(host, port)
    run_key(path)  # creates the folder and the key
    try:
        family, *_, numeric = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(numeric[:2], family=family).close()
    except OSError as error:
        raise InputError(
            f"--listen: expected a free address of this machine, got {address} ({error.strerror})"
        ) from None
    if listen is None and str(numeric[0]).startswith("127."):
        _log(f"warning: {host} is a loopback address; set --listen to one that the trainer reaches")
    return Keeper(path, address, idle_s).run()


class Keeper:
    """Starts a server when ``engine.json`` exists; restarts it when it ends or the file changes.

    Args:
        folder: of the run.
        address: at which the server listens.
        idle_s: see :func:`main`.

    Attributes:
        end: exit code and reason when the keeper has to end.
    """

    def __init__(self, folder: Path, address: str, idle_s: float) -> None:
        self._folder, self._address, self._idle_s = folder, address, idle_s
        self._log = folder / host_log_name(address)
        self._status, self._heartbeat = folder / "status.json", folder / "heartbeats" / "rank0.json"
        self._seen_status = _content(self._status)  # of an earlier job of the run
        self._seen_heartbeat = _content(self._heartbeat)
        self._server: ServerProcess | None = None
        self._settings = ""  # content of engine.json with which the server runs
        self._host_timeout_s = 0.0
        self._last_answer = 0.0  # 0: the server has not answered yet
        self._start_at = 0.0
        self._last_sign = time.monotonic()  # of the run
        self.end: tuple[int, str] | None = None

    def run(self) -> int:
        """Work until the end. Returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: self._finish(0, signal.Signals(number).name))
        _log(f"keeps a server on {self._address} for the run in {self._folder}")
        try:
            while self.end is None:
                self.step()
                time.sleep(_TICK_SECONDS)
        finally:
            self._stop()
        code, reason = self.end
        _log(f"ends: {reason}")
        return code

    def step(self) -> None:
        """Check the run's files and the server once."""
        is_new = _content(self._status) != self._seen_status
        if is_new and read_json(self._status).get("state") == "done":
            self._finish(0, "the run is over")
        now, heartbeat = time.monotonic(), _content(self._heartbeat)
        if heartbeat != self._seen_heartbeat:
            self._last_sign, self._seen_heartbeat = now, heartbeat
        if (idle := now - self._last_sign) > self._idle_s:
            limit = f"in {self._folder} for {idle:.0f} s (--idle {self._idle_s:g})"
            self._finish(IDLE_EXIT_CODE, f"no owner and no heartbeat of the run {limit}")
        try:
            settings = (self._folder / SETTINGS_FILE).read_text(encoding="utf-8")
        except OSError:
            settings = self._settings
        if self._server is not None and settings != self._settings:
            self._stop()
            self._start_at = now
            _log(f"{SETTINGS_FILE} has changed; the server restarts")
        elif self._server is not None and not self._server.is_alive:
            code, pause = self._server.returncode, 0.0 if self._last_answer else _PAUSE_SECONDS
            self._stop()
            self._start_at = now + pause
            restart = f"the next one starts in {pause:g} s; see {self._log}"
            _log(f"the server ended with exit code {code}; {restart}")
        if self._server is not None:
            self._check(self._server)
        elif settings and now >= self._start_at and self.end is None:
            self._start(settings)

    def _finish(self, code: int, reason: str) -> None:
        self.end = self.end or (code, reason)

    def _start(self, settings: str) -> None:
        try:
            config = EngineConfig(
                **json.loads(settings),
                folder=str(self._folder),
                listen=self._address,
                log_name=self._log.name,
            )
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{self._folder / SETTINGS_FILE}: expected engine settings of this package's "
                f"version, got {error}"
            ) from None
        self._settings, self._last_answer = settings, 0.0
        self._host_timeout_s = config.host_timeout_s
        self._server = ServerProcess(config)
        _log(f"started a server (process {self._server.pid})")

    def _check(self, process: ServerProcess) -> None:
        """Note whether the server has an owner. Kill a server that stopped answering."""
        try:
            info = call_once(self._address, run_key(self._folder), f"{PREFIX}/info")
        except (EngineError, *NO_ANSWER):
            silent = time.monotonic() - self._last_answer
            if self._last_answer and silent > self._host_timeout_s:
                _log(f"the server gave no answer for {self._host_timeout_s:g} s")
                process.kill()
            return
        if not self._last_answer:
            _log(f"the server on {self._address} is ready")
        self._last_answer = time.monotonic()
        if info["owner"]:
            self._last_sign = self._last_answer

    def _stop(self) -> None:
        if self._server is not None:
            self._server.kill()
        self._server = None


def _content(path: Path) -> tuple[int, bytes] | None:
    """Time stamp and content of a file, to detect that it was written; ``None``: no file."""
    try:
        return path.stat().st_mtime_ns, path.read_bytes()
    except OSError:
        return None


def _log(text: str) -> None:
    print(f"keeper: {text}", flush=True)
