"""``megatron-espo serve``: keeps one vLLM server running on a machine without trainer ranks, for the run in a folder."""

import json
import os
import shlex
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import torch

from megatron_espo.addresses import DEFAULT_PORT, parse_address, show_address
from megatron_espo.errors import InputError
from megatron_espo.rollout.remote import SETTINGS_FILE, ask, host_log_name, settings_digest
from megatron_espo.rollout.server import (
    SETTINGS_VARIABLE,
    EngineConfig,
    ServerProcess,
    read_key,
    run_key_file,
    server_command,
    server_environment,
)
from megatron_espo.run_files import read_json

IDLE_EXIT_CODE = 1
_TICK_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0


def main(folder: str, listen: str | None, idle_s: float, print_only: bool = False) -> int:
    """Keep a server running until the run is over, a signal arrives, or the run is silent. Call it in the main thread.

    Args:
        folder: of the run; all hosts share it.
        listen: ``host:port``; ``None``: the address of this machine's name.
        idle_s: the longest time without an owner and without a heartbeat of the run.
        print_only: print the server's command and return.

    Returns:
        Exit code: 0, or 1 after ``idle_s``.

    Raises:
        InputError: the address cannot be used, other users may read the run's key, or ``engine.json`` is not valid.
    """
    try:
        host, port = parse_address(listen or show_address(socket.gethostname(), DEFAULT_PORT))
    except ValueError as error:
        raise InputError(f"--listen: {error}") from None
    path = Path(folder).absolute()
    path.mkdir(parents=True, exist_ok=True)
    read_key(run_key_file(path))
    if print_only:
        print(printed_command(path, show_address(host, port)))
        return 0
    own = _check_address(host, port)
    if listen is None and own.startswith("127."):
        _say(f"warning: {host} is a loopback address here; give --listen an address that the trainer can reach")
    return Keeper(path, show_address(host, port), idle_s).run()


def _check_address(host: str, port: int) -> str:
    """The numeric address of ``host`` after a try to listen there."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.create_server(address[:2], family=family):
            return address[0]
    except OSError as error:
        address = show_address(host, port)
        raise InputError(
            f"--listen: expected a free address of this machine, got {address} ({error.strerror})"
        ) from None


def read_settings(text: str, folder: Path, address: str) -> EngineConfig:
    """The settings of the server on this host, from the text of ``engine.json``."""
    try:
        config = EngineConfig(**json.loads(text), folder=str(folder))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{folder / SETTINGS_FILE}: expected the settings of an engine of this package's version, got {error}"
        ) from None
    return replace(config, listen=address, log_name=host_log_name(address))


def printed_command(folder: Path, address: str) -> str:
    """One shell command that starts the server without a keeper."""
    try:
        text = (folder / SETTINGS_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{folder / SETTINGS_FILE}: no such file; the trainer writes it when it starts") from None
    config, is_cpu = read_settings(text, folder, address), not torch.cuda.is_available()
    host, port = parse_address(address)
    environment = server_environment(config, is_cpu, run_key_file(folder))
    words = [f"{name}={value}" for name, value in environment.items() if os.environ.get(name) != value]
    return shlex.join(["env", *words, *server_command(config, ["--host", host, "--port", str(port)], is_cpu)])


class Keeper:
    """Starts a server when ``engine.json`` appears, and another one when the server ends or ``engine.json`` changes.

    Args:
        folder: of the run.
        address: at which the server listens.
        idle_s: see :func:`main`.

    Attributes:
        end: exit code and reason, once the keeper has to end.
    """

    def __init__(self, folder: Path, address: str, idle_s: float) -> None:
        self._folder, self._address, self._idle_s = folder, address, idle_s
        self._status, self._heartbeat = _File(folder / "status.json"), _File(folder / "heartbeats" / "rank0.json")
        self._server: ServerProcess | None = None
        self._settings = ""  # text of engine.json with which the server runs
        self._answered = 0.0  # when the server answered last; 0: not yet
        self._pause, self._start_at = 0.0, 0.0
        self._heard = time.monotonic()
        self.end: tuple[int, str] | None = None

    def run(self) -> int:
        """Work until the end; returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: self._finish(0, signal.Signals(number).name))
        _say(f"keeps a server on {self._address} for the run in {self._folder}")
        try:
            while self.end is None:
                self.step()
                time.sleep(_TICK_SECONDS)
        finally:
            self._stop()
        code, why = self.end
        _say(f"ends: {why}")
        return code

    def step(self) -> None:
        """Look once at the run's files and at the server."""
        self._look_at_run()
        self._look_at_server()

    def _finish(self, code: int, why: str) -> None:
        self.end = self.end or (code, why)

    def _look_at_run(self) -> None:
        if self._status.is_new() and read_json(self._status.path).get("state") == "done":
            self._finish(0, "the run is over")
        if self._heartbeat.is_new():
            self._heard = time.monotonic()
        silent = time.monotonic() - self._heard
        if silent > self._idle_s:
            where = f"in {self._folder} for {silent:.0f} s (--idle {self._idle_s:g})"
            self._finish(IDLE_EXIT_CODE, f"no owner and no heartbeat of the run {where}")

    def _look_at_server(self) -> None:
        try:
            settings = (self._folder / SETTINGS_FILE).read_text(encoding="utf-8")
        except OSError:
            settings = self._settings
        now = time.monotonic()
        if self._server is not None and settings != self._settings:
            self._stop()
            self._start_at = now
            _say(f"{SETTINGS_FILE} has changed; the server starts again")
        elif self._server is not None and not self._server.is_alive:
            code, was_up = self._server.returncode, self._answered > 0
            self._stop()
            self._pause = 0.0 if was_up else min(_LONGEST_PAUSE_SECONDS, max(1.0, 2 * self._pause))
            self._start_at = now + self._pause
            log = self._folder / host_log_name(self._address)
            _say(f"the server ended with exit code {code}; the next one starts in {self._pause:g} s; see {log}")
        if self._server is not None:
            self._ask()
        elif settings and now >= self._start_at and self.end is None:
            self._start(settings)

    def _start(self, settings: str) -> None:
        config = read_settings(settings, self._folder, self._address)
        self._settings, self._answered, self._host_timeout_s = settings, 0.0, config.host_timeout_s
        environment = {SETTINGS_VARIABLE: settings_digest(settings)}
        self._server = ServerProcess(config, not torch.cuda.is_available(), environment)
        _say(f"started a server (process {self._server.pid})")

    def _ask(self) -> None:
        """See whether the server has an owner; kill one that answered before and answers no more."""
        try:
            _, info = ask(self._address, read_key(run_key_file(self._folder)), "/info")
        except OSError:
            if self._answered and time.monotonic() - self._answered > self._host_timeout_s:
                _say(f"the server gave no answer for {self._host_timeout_s:g} s")
                self._server.kill()
            return
        if not self._answered:
            _say(f"the server on {self._address} is ready")
        self._answered = time.monotonic()
        if info.get("owner"):
            self._heard = self._answered

    def _stop(self) -> None:
        if self._server is not None:
            self._server.kill()
        self._server = None


class _File:
    """Tells when a file was written again. A time stamp is compared with earlier ones of the same file only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, bytes] | None = None
        self.is_new()

    def is_new(self) -> bool:
        """Whether the file is there and was written since the last call."""
        try:
            with open(self.path, "rb") as file:
                found = os.fstat(file.fileno()).st_mtime_ns, file.read()
        except OSError:
            return False
        seen, self._seen = self._seen, found
        return found != seen


def _say(text: str) -> None:
    print(f"keeper: {text}", flush=True)
