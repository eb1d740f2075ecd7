"""The owner's side of a server on another machine: write its settings, find a free host, hold the lease."""

import hashlib
import http.client
import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_espo.addresses import parse_address
from megatron_espo.rollout.engine import EngineError, Phase
from megatron_espo.rollout.server import PREFIX, EngineConfig, package_versions, read_key, run_key_file
from megatron_espo.rollout.transport import vllm_backend
from megatron_espo.run_files import write_durably

SETTINGS_FILE = "engine.json"
_ASK_SECONDS = 5.0
_PAUSE_SECONDS = 1.0
# Settings of one owner, or of one host.
_OWN = ("folder", "log_name", "visible_devices", "hosts", "listen", "timeout_s", "start_timeout_s", "temperature")

logger = logging.getLogger(__name__)


def settings_text(config: EngineConfig) -> str:
    """The text of ``engine.json``: the settings that all engines of a run have in common."""
    settings = {name: value for name, value in asdict(config).items() if name not in _OWN}
    return json.dumps(settings, indent=2, sort_keys=True) + "\n"


def settings_digest(text: str) -> str:
    """Name of one version of ``engine.json``."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def host_log_name(address: str) -> str:
    """File in the run's folder with the output of the server at ``address``."""
    host, port = parse_address(address)
    return f"engine-{host.replace(':', '_')}-{port}.log"


def ask(
    address: str, key: str, path: str, body: dict[str, Any] | None = None, timeout_s: float = _ASK_SECONDS
) -> tuple[int, dict[str, Any]]:
    """One request to a route under ``/megatron_espo``: GET, or POST with a ``body``.

    Returns:
        Status and content.

    Raises:
        OSError: no answer, or none of an engine.
    """
    connection = http.client.HTTPConnection(*parse_address(address), timeout=timeout_s)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    try:
        text = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", PREFIX + path, text, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    except (http.client.HTTPException, ValueError) as error:
        raise ConnectionError(f"not the answer of an engine: {error!r}") from None
    finally:
        connection.close()


class RemoteServers:
    """The hosts that one owner may ask, in order. The host that was taken last is asked last the next time.

    Args:
        config: with ``hosts``.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config, self.order = config, list(config.hosts)
        self.started = False

    def start(self) -> "RemoteServer":
        """Ask the hosts for a server, in the background.

        Raises:
            InputError: other users may read the run's key.
        """
        key = read_key(run_key_file(self.config.folder))
        path, text = Path(self.config.folder, SETTINGS_FILE), settings_text(self.config)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_durably(path, text)
        return RemoteServer(self, key)


class RemoteServer:
    """One leased server, with the interface of ``server.ServerProcess``.

    Attributes:
        address: ``host:port``; ``None`` until a host is found.
        pid, returncode: ``None``.
        error: why no host was found; ``None``: the search goes on, or it found one.
    """

    pid = returncode = None

    def __init__(self, hosts: RemoteServers, key: str) -> None:
        self.address: str | None = None
        self.error: EngineError | None = None
        self._hosts, self._config, self._key = hosts, hosts.config, key
        self._owner = f"{self._config.log_path.stem} of {socket.gethostname()} {uuid.uuid4().hex[:8]}"
        self._closed, self._lost = threading.Event(), False
        self._renewed = 0.0
        self._thread = threading.Thread(target=self._run, name="engine-lease", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """False: no host was found in time, or the lease is lost."""
        return self.error is None and not self._lost

    @property
    def final(self) -> bool:
        """Another attempt would fail in the same way."""
        return self.error is not None and self.error.final

    @property
    def log_path(self) -> Path:
        return Path(self._config.folder, host_log_name(self.address)) if self.address else self._config.log_path

    def kill(self) -> None:
        """End the server, whose weights belong to nobody, by giving up the lease. Safe to call twice."""
        self._closed.set()
        self._thread.join(2 * _ASK_SECONDS)
        if self.address is not None and not self._lost:
            self._lost = True
            with suppress(OSError):
                ask(self.address, self._key, "/release", {"owner": self._owner})

    def _run(self) -> None:
        try:
            self._find()
        except EngineError as error:
            self.error = error
        except Exception as error:
            self.error = EngineError(f"start: the search for a rollout engine failed: {error!r}", Phase.START)
        else:
            self._renew()

    def _find(self) -> None:
        config, began, warned = self._config, time.monotonic(), False
        while not self._closed.is_set():
            refusals: dict[str, Exception] = {}
            for address in self._hosts.order:
                try:
                    self._take(address)
                except (_RefusedError, OSError) as error:
                    refusals[address] = error
                else:
                    self._hosts.order = [*(other for other in self._hosts.order if other != address), address]
                    self._hosts.started = True
                    self.address = address
                    return
                if self._closed.is_set():
                    return
            why = "; ".join(f"{address}: {self._in_words(address, error)}" for address, error in refusals.items())
            hopeless = all(isinstance(error, _WrongKeyError) for error in refusals.values())
            # Machines that refuse a connection are there: their keepers may be starting a server.
            starting = any(isinstance(error, ConnectionRefusedError) for error in refusals.values())
            limit, setting = config.host_timeout_s, "rollout.host_timeout_s"
            if starting or not self._hosts.started:
                limit, setting = config.start_timeout_s, "rollout.timeout_s"
            if hopeless or time.monotonic() - began > limit:
                in_time = "" if hopeless else f" within {limit:g} s ({setting})"
                message = f"start: none of rollout.hosts gave a rollout engine{in_time}: {why}"
                raise EngineError(message, Phase.START, final=True)
            if not warned:
                logger.warning("no host for the rollout engine yet; asking for at most %g s: %s", limit, why)
            warned = True
            self._closed.wait(_PAUSE_SECONDS)

    def _take(self, address: str) -> None:
        """Compare the server at ``address`` with the settings, and take its lease."""
        status, info = ask(address, self._key, "/info")
        if status == 401:
            raise _WrongKeyError()
        if status != 200:
            raise _RefusedError(f"{status} {info.get('error', info)}")
        if found := self._differences(info):
            raise _RefusedError(found)
        self._renewed = time.monotonic()
        self._lease(address, renew=False)

    def _lease(self, address: str, renew: bool) -> None:
        config = self._config
        body = {"owner": self._owner, "seconds": config.host_timeout_s, "renew": renew}
        status, answer = ask(address, self._key, "/lease", body, min(_ASK_SECONDS, config.host_timeout_s / 5))
        if status != 200:
            raise _RefusedError(str(answer.get("error", status)))

    def _differences(self, info: dict[str, Any]) -> str | None:
        config = self._config
        expected: dict[str, Any] = {
            "model": os.path.realpath(config.model),
            "dtype": config.dtype,
            "transport": None if config.load_weights else vllm_backend(config.transport),
            "tensor_parallel_size": config.tensor_parallel_size,
            "logprobs_mode": "processed_logprobs",
        }
        if config.max_model_len is not None:
            expected["max_model_len"] = config.max_model_len
        if info.get("settings"):  # a server that was started by hand has none
            expected["settings"] = settings_digest(settings_text(config))
        expected |= package_versions()
        found = info | info.get("packages", {})
        return "; ".join(
            f"{name}: expected {value}, got {found.get(name)}" for name, value in expected.items() if found.get(name) != value
        ) or None  # fmt: skip

    def _renew(self) -> None:
        while not self._closed.wait(self._config.host_timeout_s / 5):
            began = time.monotonic()
            try:
                self._lease(self.address, renew=True)
                self._renewed = began
            except _RefusedError as error:  # another server, which does not know this owner
                logger.warning("the rollout engine on %s is another one than before: %s", self.address, error)
                self._lost = True
            except OSError:
                self._lost = time.monotonic() - self._renewed > self._config.host_timeout_s
            if self._lost:
                return

    def _in_words(self, address: str, error: Exception) -> str:
        if isinstance(error, _WrongKeyError):
            key = run_key_file(self._config.folder)
            return f"it has another key than {key}; start its keeper for this run's folder, which both machines share"
        if isinstance(error, OSError):
            log = Path(self._config.folder, host_log_name(address))
            return f"no answer ({error.strerror or error}); its server's output is in {log}"
        return str(error)


class _RefusedError(Exception):
    """A server is there and cannot be used."""


class _WrongKeyError(_RefusedError):
    """A server has another run's key."""
