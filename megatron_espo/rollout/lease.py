"""Leases of servers on other machines: the routes of the server, and the owner that uses them.

An owner asks ``/megatron_espo/info``, compares the settings, takes the lease and renews it. A
server ends when its lease runs out or is released, because nobody may use its weights then; its
keeper starts a new server. All owners and keepers of a run share ``engine.json`` in its folder.
"""

import asyncio
import errno
import itertools
import json
import logging
import math
import os
import signal
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from megatron_espo.distributed.addresses import parse_address
from megatron_espo.files import write_durably
from megatron_espo.rollout.engine import EngineError, HttpStatusError, Phase
from megatron_espo.rollout.guard import STATE, error_response
from megatron_espo.rollout.http_client import NO_ANSWER, call_once
from megatron_espo.rollout.server import (
    PREFIX,
    SETTINGS_VARIABLE,
    EngineConfig,
    package_versions,
    run_key,
    run_key_file,
)

SETTINGS_FILE = "engine.json"
_CALL_SECONDS = 5.0
_RETRY_SECONDS = 1.0
logger = logging.getLogger(__name__)


def settings_text(config: EngineConfig) -> str:
    """The content of ``engine.json``."""
    return json.dumps(config.shared, indent=2, sort_keys=True) + "\n"


def host_log_name(address: str) -> str:
    """Name of the log in the run's folder of the server at ``address``."""
    host, port = parse_address(address)
    return f"engine-{host.replace(':', '_')}-{port}.log"


# -- in the server ---------------------------------------------------------------------------------


class Lease:
    """Owner of this server. A server that nobody owns yet has no time limit."""

    owner = ""
    end = math.inf  # on the clock of time.monotonic()

    async def watch(self) -> None:
        """End this process when the lease runs out."""
        late = 0
        # A blocked event loop must first read waiting renewals: the lease ends at the second check.
        while late < 2:
            await asyncio.sleep(1.0)
            late = late + 1 if time.monotonic() > self.end else 0
        _end_server(f"the lease of {self.owner} ran out")


LEASE = Lease()


async def take_lease(request: Request) -> Response:
    """Take or renew the lease: ``{"owner": name, "seconds": s, "renew": bool}``.

    The answer is 409 if another owner has the lease, or if nobody has a lease that is renewed.
    """
    body = await request.json()
    if LEASE.owner != body["owner"] and (LEASE.owner or body["renew"]):
        return _refusal()
    LEASE.owner, LEASE.end = body["owner"], time.monotonic() + body["seconds"]
    return JSONResponse({})


async def release_lease(request: Request) -> Response:
    """Release the lease (``{"owner": name}``), which ends the server. 409 for anybody else."""
    owner = (await request.json())["owner"]
    if not owner or LEASE.owner != owner:
        return _refusal()
    return JSONResponse({}, background=BackgroundTask(_end_server, f"{owner} released its lease"))


def _refusal() -> Response:
    return error_response(f"owned by {LEASE.owner or 'nobody'}", 409)


def _end_server(reason: str) -> None:
    """Kill this process; its workers die with it."""
    print(f"megatron_espo: {reason}; this server ends", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


async def info(request: Request) -> Response:
    """Settings that an owner compares before it takes the lease, and the state of the weights."""
    return JSONResponse({
        "packages": package_versions(),
        "settings": json.loads(os.environ[SETTINGS_VARIABLE]),
        "weights": STATE.weights,
        "version": STATE.version,
        "owner": LEASE.owner,
    })  # fmt: skip


ROUTES = {"/lease": take_lease, "/release": release_lease, "/info": info}


# -- in the owner ----------------------------------------------------------------------------------


@dataclass
class HostOrder:
    """Hosts in the order in which an owner asks them. The host taken last moves to the end.

    Attributes:
        addresses: ``host:port`` of each.
        used: whether any host was taken yet.
    """

    addresses: list[str]
    used: bool = False


class LeasedServer:
    """Finds a server on another machine and renews its lease in a background thread.

    Has the interface of ``server.ServerProcess``, and :meth:`find`.

    Args:
        config: with ``hosts``; its common settings are written to ``engine.json``.
        hosts: updated when a host is taken.

    Attributes:
        address: ``host:port``; empty until a host is taken.
        is_alive: False when the lease is lost.
        lost: why the server cannot be used when ``is_alive`` is false.
        pid, returncode: ``None``.

    Raises:
        InputError: other users may read the run's key.
    """

    pid = returncode = None
    lost = "is out of reach (it has lost its lease; rollout.host_timeout_s)"

    def __init__(self, config: EngineConfig, hosts: HostOrder) -> None:
        self.address, self.is_alive = "", True
        self._config, self._hosts, self._key = config, hosts, run_key(config.folder)
        name = f"{config.log_path.stem} of {socket.gethostname()} {uuid.uuid4().hex[:8]}"
        self._request = {"owner": name, "seconds": config.host_timeout_s}
        self._closed, self._renewed = threading.Event(), 0.0
        path, text = Path(config.folder, SETTINGS_FILE), settings_text(config)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_durably(path, text)

    @property
    def log_path(self) -> Path:
        name = host_log_name(self.address) if self.address else self._config.log_name
        return Path(self._config.folder, name)

    def wait(self, seconds: float) -> None:
        """Return at once: the end of a process on another machine is not visible."""

    def kill(self) -> None:
        """Release the lease, which ends the server. Safe to call twice."""
        self._closed.set()
        if self.address and self.is_alive:
            self.is_alive = False
            with suppress(EngineError, *NO_ANSWER):
                self._call(self.address, "/release", self._request)

    def _call(self, address: str, route: str, body: dict | None = None) -> dict[str, Any]:
        limit = min(_CALL_SECONDS, self._config.host_timeout_s / 5)
        return call_once(address, self._key, PREFIX + route, body, limit)

    def find(self) -> None:
        """Take the first free host whose server suits.

        Raises:
            EngineError: none was found in time, with the reason of every host.
        """
        config, hosts, began = self._config, self._hosts, time.monotonic()
        for attempt in itertools.count():
            errors: dict[str, Exception] = {}
            for address in list(hosts.addresses):
                try:
                    self._take(address)
                except (EngineError, *NO_ANSWER) as error:
                    errors[address] = error
                else:
                    hosts.addresses.remove(address)
                    hosts.addresses.append(address)
                    hosts.used, self.address = True, address
                    threading.Thread(target=self._renew, name="lease", daemon=True).start()
                    return
            # A machine that refuses a connection runs. Its keeper may be starting a server.
            refused = errno.ECONNREFUSED
            is_starting = any(getattr(e, "errno", None) == refused for e in errors.values())
            limit, setting = config.host_timeout_s, "rollout.host_timeout_s"
            if is_starting or not hosts.used:
                limit, setting = config.start_timeout_s, "rollout.timeout_s"
            within = f" within {limit:g} s ({setting})"
            if is_hopeless := all(map(_is_wrong_key, errors.values())):
                within = ""
            reasons = "; ".join(f"{host}: {self._reason(host, e)}" for host, e in errors.items())
            if is_hopeless or time.monotonic() - began > limit:
                message = f"start: none of rollout.hosts gave a rollout engine{within}: {reasons}"
                raise EngineError(message, Phase.START, final=True)
            if attempt == 0:
                logger.warning("no host for the rollout engine yet%s: %s", within, reasons)
            time.sleep(_RETRY_SECONDS)

    def _take(self, address: str) -> None:
        """Compare the settings of the server at ``address`` and take its lease."""
        info = self._call(address, "/info")
        found = info.get("settings", {}) | info.get("packages", {})
        differences = "; ".join(
            f"{name}: expected {value}, got {found.get(name)}"
            for name, value in (self._config.shared | package_versions()).items()
            if found.get(name) != value
        )
        if differences:
            raise EngineError(differences, Phase.START)
        self._renewed = time.monotonic()
        self._call(address, "/lease", self._request | {"renew": False})

    def _renew(self) -> None:
        limit = self._config.host_timeout_s
        while self.is_alive and not self._closed.wait(limit / 5):
            began = time.monotonic()
            try:
                self._call(self.address, "/lease", self._request | {"renew": True})
                self._renewed = began
            except EngineError as error:
                logger.warning("another server runs on %s now: %s", self.address, error)
                self.is_alive = False
            except NO_ANSWER:
                self.is_alive = time.monotonic() - self._renewed <= limit

    def _reason(self, address: str, error: Exception) -> str:
        folder = Path(self._config.folder)
        if _is_wrong_key(error):
            return (
                f"it has another key than {run_key_file(folder)}; start its keeper for this run's "
                "folder, which both machines share"
            )
        if isinstance(error, EngineError):
            return str(error)
        number = getattr(error, "errno", None)
        detail = os.strerror(number) if number and number > 0 else str(error) or repr(error)
        log = folder / host_log_name(address)
        return f"no answer ({detail}); its server's output is in {log}"


def _is_wrong_key(error: Exception) -> bool:
    return isinstance(error, HttpStatusError) and error.status == 401
