"""The conversation with the process of a rollout engine, on this machine or on one of ``rollout.hosts``."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron_espo.rollout.config import EngineConfig
from megatron_espo.rollout.lifecycle import EngineError
from megatron_espo.rollout.process import LocalProcess
from megatron_espo.rollout.remote import Hosts, RemoteProcess

_POLL_SECONDS = 0.5
_LOG_LINES = 20
# Phases of the calls that are not rollouts.
_PHASES = {
    "start": "start",
    "init_weight_transfer_engine": "connect",
    "poison": "connect",
    "sleep": "sleep",
    "wake": "wake",
    "start_weight_update": "transfer",
    "update_weights": "load",
    "finish_weight_update": "finish",
    "served_checksums": "verify",
    "canary": "canary",
}


def launcher(config: EngineConfig) -> Callable[[], LocalProcess | RemoteProcess]:
    """Starts an engine's process where ``config`` wants it, anew on each call."""
    return Hosts(config).start if config.hosts else partial(LocalProcess, config)


class Child:
    """One engine process that has been told to start. Any failure kills it: what state it is in is unknown then."""

    def __init__(self, config: EngineConfig, process: LocalProcess | RemoteProcess):
        self._config, self._process = config, process

    @property
    def pid(self) -> int | None:
        """``None`` on another machine."""
        return self._process.pid

    @property
    def own_address(self) -> str:
        """This machine's address as the engine reaches it."""
        return self._process.own_address

    def call(
        self,
        method: str,
        args: tuple,
        timeout: float,
        on_progress: Callable[[int, int], None] | None = None,
        on_finished: Callable[[list], None] | None = None,
    ) -> Any:
        """Answer of the child. EngineError when it refuses, dies, or gives no news for ``timeout`` seconds."""
        self.send(method, args)
        return self.receive(method, timeout, on_progress, on_finished)

    def send(self, method: str, args: tuple) -> None:
        try:
            self._process.connection.send((method, args))
        except OSError as error:
            raise self._failed(method, self._loss(error)) from None

    def receive(
        self,
        method: str,
        timeout: float,
        on_progress: Callable[[int, int], None] | None = None,
        on_finished: Callable[[list], None] | None = None,
    ) -> Any:
        progress, deadline = (0, 0), time.monotonic() + timeout
        try:
            while time.monotonic() < deadline:
                if message := self._take(method, min(_POLL_SECONDS, timeout)):
                    kind, payload = message
                    if kind == "result":
                        return payload
                    if kind == "error":
                        raise self._failed(method, f"failed: {payload}")
                    deadline = time.monotonic() + timeout
                    if kind == "finished":
                        on_finished(payload)
                    else:
                        progress = payload
                if on_progress is not None:
                    on_progress(*progress)
        except EngineError:
            raise
        except BaseException:
            self.kill()
            raise
        raise self._failed(method, f"gave no news for {timeout:g} s (rollout.timeout_s)")

    def _take(self, method: str, wait_s: float) -> tuple[str, Any] | None:
        """The next message, if one comes in time."""
        try:
            if self._process.connection.poll(wait_s):
                return self._process.connection.recv()
        except (EOFError, OSError) as error:
            raise self._failed(method, self._loss(error)) from None
        if not self._process.is_alive:
            raise self._failed(method, "has died")
        return None

    def close(self) -> None:
        """End the process and whatever it started, politely if it can be."""
        self._process.close()

    def kill(self) -> None:
        """End them at once."""
        self._process.kill()

    def _loss(self, error: EOFError | OSError) -> str:
        if isinstance(error, EOFError | ConnectionError):
            return "has died"
        return f"is out of reach ({error.strerror}; rollout.host_timeout_s {self._config.host_timeout_s:g})"

    def _failed(self, method: str, what: str) -> EngineError:
        self.kill()
        code = self._process.returncode
        end = "" if code in (None, 0, -signal.SIGKILL) else f" (exit code {code})"
        log = f"Last lines of {self._config.log_path}:\n{self._log_tail()}"
        phase = "transfer" if "transfer: " in what else _PHASES.get(method, "rollout")
        return EngineError(f"{method}: the rollout engine{self._process.name} {what}{end}.\n{log}", phase)

    def _log_tail(self) -> str:
        try:
            with open(self._config.log_path, "rb") as log:
                log.seek(max(0, os.fstat(log.fileno()).st_size - 16384))
                return "\n".join(log.read().decode(errors="replace").splitlines()[-_LOG_LINES:])
        except FileNotFoundError:
            return "(none)"  # another machine wrote it; the file system may show it later

