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
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from megatron_espo.distributed.addresses import parse_address
from megatron_espo.files import write_durably
from megatron_espo.rollout import server
from megatron_espo.rollout.engine import EngineError, WrongKeyError
from megatron_espo.rollout.guard import STATE
from megatron_espo.rollout.http_client import NO_ANSWER, call_once
from megatron_espo.rollout.server import PREFIX, EngineConfig, package_versions, run_key

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
        """Kill this process, and so its workers, when the lease runs out."""
        late = 0
        # A blocked event loop must first read waiting renewals: the lease ends at the second check.
        while late < 2:
            await asyncio.sleep(1.0)
            late = late + 1 if time.monotonic() > self.end else 0
        print(f"megatron_espo: the lease of {self.owner} is over; this server ends", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


LEASE = Lease()


async def set_lease(request: Request) -> Response:
    """Take, renew or (0 seconds) end the lease: ``{"owner": name, "seconds": s, "renew": bool}``.

    The answer is 409 if another owner has the lease, or if nobody has a lease that is renewed.
    """
    body = await request.json()
    if LEASE.owner != body["owner"] and (LEASE.owner or body["renew"]):
        return PlainTextResponse(f"owned by {LEASE.owner or 'nobody'}", 409)
    # A renewal that arrives after the end of the lease must not renew it.
    LEASE.owner = body["owner"] if body["seconds"] else "an owner that has ended its lease"
    LEASE.end = time.monotonic() + body["seconds"]
    return JSONResponse({})


async def info(request: Request) -> Response:
    """Settings that an owner compares before it takes the lease, and the state of the weights."""
    return JSONResponse({
        "settings": json.loads(os.environ[server.SETTINGS_VARIABLE]) | package_versions(),
        "weights": STATE.weights,
        "version": STATE.version,
        "owner": LEASE.owner,
    })  # fmt: skip


ROUTES = {"/lease": set_lease, "/info": info}


# -- in the owner ----------------------------------------------------------------------------------


class LeasedServer:
    """Finds a server on another machine and renews its lease in a background thread.

    Has the interface of ``server.ServerProcess``, and :meth:`find`.

    Args:
        config: with ``hosts``; its common settings are written to ``engine.json``.
        hosts: ``host:port`` of each, in the order in which they are asked. The host that is taken
            moves to the end.

    Attributes:
        address: ``host:port``; empty until a host is taken.
        is_alive: False when the lease is lost.
        lost: why the server cannot be used when ``is_alive`` is false.
        returncode: ``None``.

    Raises:
        InputError: other users may read the run's key.
    """

    returncode = None
    lost = "is out of reach (it has lost its lease; rollout.host_timeout_s)"

    def __init__(self, config: EngineConfig, hosts: list[str]) -> None:
        self.address, self.is_alive = "", True
        self._config, self._hosts, self._key = config, hosts, run_key(config.folder)
        name = f"{config.log_path.stem} of {socket.gethostname()} {uuid.uuid4().hex[:8]}"
        self._lease = {"owner": name, "seconds": config.host_timeout_s, "renew": True}
        self._closed, self._renewed = threading.Event(), 0.0
        path, text = Path(config.folder, SETTINGS_FILE), settings_text(config)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_durably(path, text)

    def wait(self, seconds: float) -> None:
        """Return at once: the end of a process on another machine is not visible."""

    def kill(self) -> None:
        """End the lease, and so the server. Safe to call twice."""
        self._closed.set()
        if self.address and self.is_alive:
            self.is_alive = False
            with suppress(EngineError, *NO_ANSWER):
                self._call(self.address, "/lease", self._lease | {"seconds": 0})

    def _call(self, address: str, route: str, body: dict | None = None) -> dict[str, Any]:
        limit = min(_CALL_SECONDS, self._config.host_timeout_s / 5)
        return call_once(address, self._key, PREFIX + route, body, limit)

    def find(self) -> None:
        """Take the first free host whose server suits.

        Raises:
            EngineError: none was found in time, with the reason of every host.
        """
        config, began = self._config, time.monotonic()
        for attempt in itertools.count():
            errors: dict[str, Exception] = {}
            for address in self._hosts:
                try:
                    self._take(address)
                    return
                except (EngineError, *NO_ANSWER) as error:
                    errors[address] = error
            # A machine that answers or refuses a connection runs. Its server may be starting.
            limit, setting = config.timeout_s, "rollout.timeout_s"
            if all(map(_is_silent, errors.values())):
                limit, setting = config.host_timeout_s, "rollout.host_timeout_s"
            elif all(isinstance(error, WrongKeyError) for error in errors.values()):
                limit = 0.0
            within = f" within {limit:g} s ({setting})" if limit else ""
            reasons = "; ".join(f"{host}: {self._reason(host, e)}" for host, e in errors.items())
            if time.monotonic() - began > limit:
                message = f"start: none of rollout.hosts gave a rollout engine{within}: {reasons}"
                raise EngineError(message, final=True)
            if attempt == 0:
                logger.warning("no host for the rollout engine yet%s: %s", within, reasons)
            time.sleep(_RETRY_SECONDS)

    def _take(self, address: str) -> None:
        """Compare the settings of the server at ``address``, take its lease and renew it."""
        found = self._call(address, "/info")["settings"]
        differences = "; ".join(
            f"{name}: expected {value}, got {found.get(name)}"
            for name, value in (self._config.shared | package_versions()).items()
            if found.get(name) != value
        )
        if differences:
            raise EngineError(differences)
        self._renewed = time.monotonic()
        self._call(address, "/lease", self._lease | {"renew": False})
        self.address = address
        self.log_path = Path(self._config.folder, host_log_name(address))
        self.log_start = self.log_path.stat().st_size if self.log_path.is_file() else 0
        self._hosts.remove(address)
        self._hosts.append(address)
        threading.Thread(target=self._renew, name="lease", daemon=True).start()

    def _renew(self) -> None:
        limit = self._config.host_timeout_s
        while self.is_alive and not self._closed.wait(limit / 5):
            began = time.monotonic()
            try:
                self._call(self.address, "/lease", self._lease)
                self._renewed = began
            except EngineError as error:
                logger.warning("another server runs on %s now: %s", self.address, error)
                self.is_alive = False
            except NO_ANSWER:
                self.is_alive = time.monotonic() - self._renewed <= limit

    def _reason(self, address: str, error: Exception) -> str:
        folder = Path(self._config.folder)
        if isinstance(error, WrongKeyError):
            key = folder / server.KEY_FILE
            return f"it has another key than {key}; start its keeper for the folder of this run"
        if isinstance(error, EngineError):
            return str(error)
        number = getattr(error, "errno", None)
        detail = os.strerror(number) if number and number > 0 else str(error) or repr(error)
        log = folder / host_log_name(address)
        return f"no answer ({detail}); its server's output is in {log}"


def _is_silent(error: Exception) -> bool:
    is_answer = isinstance(error, EngineError)
    return not is_answer and getattr(error, "errno", None) != errno.ECONNREFUSED
