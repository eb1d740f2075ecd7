"""The owner's side of an engine on another machine: find an agent (``rollout.agent``) that takes it, and hold the connection."""

import logging
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from pathlib import Path

from megatron_espo.addresses import parse_address
from megatron_espo.errors import InputError
from megatron_espo.rollout import wire
from megatron_espo.rollout.config import EngineConfig
from megatron_espo.rollout.lifecycle import EngineError
from megatron_espo.rollout.process import CLOSE_SECONDS
from megatron_espo.rollout.versions import versions

_PAUSE_SECONDS = 1.0

logger = logging.getLogger(__name__)


class Hosts:
    """The agents that an owner may ask, as long as its :class:`Engine` lives. The one that was taken is the last to be asked again.

    They are asked until one takes the engine: at first for ``start_timeout_s``, since they may be starting too, later for ``host_timeout_s``.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config, self._folder = config, Path(config.log_path).parent
        self._order, self._patience = list(config.hosts), (config.start_timeout_s, "rollout.timeout_s")

    def start(self) -> "RemoteProcess":
        """An engine on the next free host; returns at once. InputError: the run's key is not to be trusted."""
        wire.run_key(self._folder)
        return RemoteProcess(self)

    def find(self, given_up: threading.Event) -> tuple[str, Connection]:
        """Address of the agent that took the engine, and the connection to the engine.

        Raises:
            EngineError: none did in time, or all refused for good; or ``given_up`` was set.
        """
        limit, setting = self._patience
        deadline, told = time.monotonic() + limit, False
        while not given_up.is_set():
            refusals: dict[str, Exception] = {}
            for address in self._order:
                try:
                    return self._take(address)
                except (AuthenticationError, _RefusedError, OSError, EOFError) as error:
                    refusals[address] = error
                if given_up.is_set():
                    break
            why = "; ".join(f"{address}: {_in_words(error)}" for address, error in refusals.items())
            for_good = all(isinstance(error, AuthenticationError) for error in refusals.values())
            if for_good or time.monotonic() > deadline:
                in_time = "" if for_good else f" within {limit:g} s ({setting})"
                raise EngineError(f"start: none of rollout.hosts took the rollout engine{in_time}: {why}", "start", final=True)
            if not told:
                logger.warning("no host for the rollout engine yet, asking for %g s more: %s", deadline - time.monotonic(), why)
            told = True
            given_up.wait(_PAUSE_SECONDS)
        raise EngineError("start: the rollout engine was closed before a host took it.", "start")

    def _take(self, address: str) -> tuple[str, Connection]:
        connection = self._ask(address)
        self._order = [*(other for other in self._order if other != address), address]
        self._patience = (self._config.host_timeout_s, "rollout.host_timeout_s")
        return address, connection

    def _ask(self, address: str) -> Connection:
        config = self._config
        connection = _open(address, self._folder)
        try:
            connection.send(("engine", versions(), config, f"{Path(config.log_path).stem} of {socket.gethostname()}"))
            answer, word = connection.recv()
            if answer == "refused":
                raise _RefusedError(word)
            wire.notice_loss(connection, config.host_timeout_s)
            connection.send(("start", (config,)))
        except BaseException:
            connection.close()
            raise
        return connection


class RemoteProcess:
    """An engine on another machine, as :class:`~megatron_espo.rollout.process.LocalProcess` is one on this. Found in the background."""

    pid = returncode = None
    is_alive = True  # its connection tells otherwise

    def __init__(self, hosts: Hosts) -> None:
        self._found: Future[tuple[str, Connection]] = Future()
        self._given_up = threading.Event()
        threading.Thread(target=self._search, args=(hosts,), name="engine-host", daemon=True).start()

    def _search(self, hosts: Hosts) -> None:
        try:
            self._found.set_result(hosts.find(self._given_up))
        except BaseException as error:
            self._found.set_exception(error)

    @property
    def connection(self) -> Connection:
        """Waits until a host is found; EngineError: none was."""
        return self._found.result()[1]

    @property
    def name(self) -> str:
        return f" on {self._found.result()[0]}"

    @property
    def own_address(self) -> str:
        return wire.own_address(self.connection)

    def close(self) -> None:
        """End the engine, politely if it listens."""
        self._given_up.set()
        with suppress(EngineError, OSError):
            self.connection.send(("close", ()))
        self._wait_for_end()
        self.kill()

    def kill(self) -> None:
        """Hang up, at which the agent kills the engine; returns when it has, if it can be reached."""
        self._given_up.set()
        with suppress(EngineError, OSError), wire.as_socket(self.connection) as sock:
            sock.shutdown(socket.SHUT_WR)
        self._wait_for_end()
        with suppress(EngineError):
            self.connection.close()

    def _wait_for_end(self) -> None:
        """The agent hangs up when the engine is gone, and is free then."""
        deadline = time.monotonic() + CLOSE_SECONDS
        with suppress(EngineError, EOFError, OSError):
            while self.connection.poll(max(0.0, deadline - time.monotonic())):
                self.connection.recv()


class _RefusedError(Exception):
    """An agent's word why it does not take the engine."""


def _in_words(refusal: Exception) -> str:
    if isinstance(refusal, OSError | EOFError):
        return f"no answer ({getattr(refusal, 'strerror', None) or str(refusal) or 'it hung up'})"
    return str(refusal)


def dismiss(hosts: Sequence[str], folder: str | Path) -> None:
    """Tell the agents that the run in ``folder`` is over. Those that cannot be reached hear nothing; they end after their own limit."""

    def tell(address: str) -> None:
        with suppress(AuthenticationError, InputError, OSError), _open(address, folder) as connection:
            connection.send(("over",))

    if hosts:
        with ThreadPoolExecutor(len(hosts)) as pool:
            list(pool.map(tell, hosts))


def _open(address: str, folder: str | Path) -> Connection:
    try:
        return wire.connect(*parse_address(address), wire.run_key(folder))
    except AuthenticationError:
        raise AuthenticationError(
            f"it has another key than {Path(folder, wire.KEY_FILE)}; start its agent for this run's folder, which both machines must share"
        ) from None
