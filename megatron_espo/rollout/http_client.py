"""HTTP to one server, on a background event loop. Coroutines run there; other threads wait for them."""

import asyncio
import socket
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import aiohttp
import numpy as np
from safetensors.numpy import load

from megatron_espo.rollout.engine import EngineError, Generation, Phase, Sampling
from megatron_espo.rollout.server import PREFIX

_CONNECT_SECONDS = 5.0


class LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="rollouts", daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Future:
        """Start a coroutine from another thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Coroutine[Any, Any, Any], timeout: float | None = None) -> Any:
        """Wait for a coroutine's result from another thread. TimeoutError cancels it."""
        future = self.submit(coroutine)
        try:
            return future.result(timeout)
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel the coroutines that still run, and stop the loop."""
        if self._thread.is_alive():
            with suppress(TimeoutError):
                self.run(_cancel_tasks(), 5.0)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(5.0)


async def _cancel_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class HttpClient:
    """Requests to one server. All methods are coroutines of one event loop.

    Args:
        address: ``unix:<path>`` or ``host:port``.
        key: of the run.
        host_timeout_s: a request fails when the server's machine is silent for so long, whatever it waits for.
    """

    def __init__(self, address: str, key: str, host_timeout_s: float = 60.0) -> None:
        self.address, self._key, self._host_timeout_s = address, key, host_timeout_s
        self._session: aiohttp.ClientSession | None = None

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            is_unix = self.address.startswith("unix:")
            connector = (
                aiohttp.UnixConnector(self.address.removeprefix("unix:"), limit=0)
                if is_unix
                else aiohttp.TCPConnector(limit=0, socket_factory=self._make_socket)
            )
            self._session = aiohttp.ClientSession(
                "http://engine" if is_unix else f"http://{self.address}",
                connector=connector,
                headers={"Authorization": f"Bearer {self._key}"},
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
            )
        return self._session

    def _make_socket(self, info: Any) -> socket.socket:
        """A socket whose kernel asks the other machine for signs of life (keepalive), and limits what is not acknowledged."""
        sock, probe = socket.socket(*info[:3]), max(1, int(self._host_timeout_s / 5))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe)
        # The last probe is sent up to one interval after this limit.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int((self._host_timeout_s - probe) * 1000))
        return sock

    async def call(self, path: str, body: dict[str, Any] | None = None, *, method: str = "POST") -> dict[str, Any]:
        """JSON in, JSON out.

        Raises:
            EngineError: an answer other than 200.
            aiohttp.ClientError, OSError: no answer.
        """
        async with self._connected().request(method, path, json=body) as response:
            if response.status != 200:
                raise EngineError(f"{path}: {response.status} {await _error_text(response)}")
            content = await response.read()
            return await response.json(content_type=None) if content else {}

    async def generate(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: Sampling,
        *,
        routed_experts: bool = False,
        canary: bool = False,
    ) -> Generation:
        """Sample one response. Errors as :meth:`call`; EngineError also where a log-prob is not finite."""
        body = {
            "request_id": request_id,
            "token_ids": np.asarray(token_ids).tolist(),
            "sampling": sampling.as_json(),
            "routed_experts": routed_experts,
            "canary": canary,
        }
        async with self._connected().post(f"{PREFIX}/generate", json=body) as response:
            if response.status != 200:
                raise EngineError(f"generate: {response.status} {await _error_text(response)}")
            arrays, reason = load(await response.read()), response.headers["x-finish-reason"]
        if not np.isfinite(arrays["logprobs"]).all():
            raise EngineError(f"generate: a log-prob of request {request_id!r} is not finite", Phase.ROLLOUT)
        return Generation(
            arrays["token_ids"], arrays["logprobs"], arrays["versions"], reason, arrays.get("routed_experts")
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


async def _error_text(response: aiohttp.ClientResponse) -> str:
    text = await response.text()
    try:
        content = await response.json(content_type=None)
        error = content["error"]
        return str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError, AttributeError):
        return text[:500]
