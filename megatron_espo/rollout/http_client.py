"""HTTP requests to an engine's server. Coroutines run on an event loop in a background thread."""

import asyncio
import json
import socket
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import aiohttp
import numpy as np
from safetensors.numpy import load

from megatron_espo.rollout.engine import EngineError, Generation, Sampling, WrongKeyError
from megatron_espo.rollout.server import PREFIX
from megatron_espo.types import SamplingMask

# Exceptions of a request that no server answered.
NO_ANSWER = (OSError, aiohttp.ClientError)
_CONNECT_SECONDS = 5.0
# vLLM's server closes a connection that is idle for 5 s. A request that it receives at that moment
# would fail and the engine would be restarted, so this side closes earlier.
_IDLE_SECONDS = 2.0
_RETRY_SECONDS = 0.1


class LoopThread:
    """An event loop in a background thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:  # cancels coroutines at last
            while True:
                try:
                    return runner.get_loop().run_forever()
                except SystemExit:  # of a coroutine, whose caller gets it too
                    continue

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Future:
        """Start a coroutine from another thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Coroutine[Any, Any, Any], timeout: float | None = None) -> Any:
        """Wait in another thread for a coroutine's result. TimeoutError cancels the coroutine."""
        future = self.submit(coroutine)
        try:
            return future.result(timeout)
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel the running coroutines and stop the loop."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(5.0)


class _UnixConnector(aiohttp.UnixConnector):
    """Connects again while the server's listen queue is full.

    asyncio then returns a socket that is not connected.
    """

    async def _create_connection(self, *args: Any) -> Any:
        while True:
            protocol = await super()._create_connection(*args)
            transport = protocol.transport
            if transport is not None and transport.get_extra_info("peername") is not None:
                return protocol
            protocol.close()
            await asyncio.sleep(_RETRY_SECONDS)


class HttpClient:
    """Requests to one server. All methods are coroutines of one event loop.

    Args:
        address: ``unix:<path>`` or ``host:port``.
        key: of the run.
        host_timeout_s: a request fails when the server's machine does not respond for this time.
    """

    def __init__(self, address: str, key: str, host_timeout_s: float = 60.0) -> None:
        self.address, self._key, self._host_timeout_s = address, key, host_timeout_s
        self._session: aiohttp.ClientSession | None = None

    def _open_session(self) -> aiohttp.ClientSession:
        options: dict[str, Any] = {"limit": 0, "keepalive_timeout": _IDLE_SECONDS}
        if self.address.startswith("unix:"):
            base, path = "http://engine", self.address.removeprefix("unix:")
            connector: aiohttp.BaseConnector = _UnixConnector(path, **options)
        else:
            base = f"http://{self.address}"
            connector = aiohttp.TCPConnector(**options, socket_factory=self._make_socket)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS)
        headers = {"Authorization": f"Bearer {self._key}"}
        return aiohttp.ClientSession(base, connector=connector, headers=headers, timeout=timeout)

    def _make_socket(self, info: Any) -> socket.socket:
        """A TCP socket with keepalive probes. Limits how long sent data may stay unacknowledged."""
        sock, probe = socket.socket(*info[:3]), max(1, int(self._host_timeout_s / 5))
        # The kernel may send its last probe up to one interval after TCP_USER_TIMEOUT.
        limit_ms = int((self._host_timeout_s - probe) * 1000)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit_ms)
        return sock

    async def _post(
        self, path: str, body: dict[str, Any] | None
    ) -> tuple[bytes, Mapping[str, str]]:
        if self._session is None:
            self._session = self._open_session()
        async with self._session.post(path, json=body) as response:
            content = await response.read()
            if response.status != 200:
                kind = WrongKeyError if response.status == 401 else EngineError
                text = content[:500].decode(errors="replace")
                with suppress(ValueError, LookupError, TypeError):
                    text = json.loads(content)["error"]["message"]  # of vLLM's own routes
                raise kind(f"{path}: {response.status} {text}")
            return content, response.headers

    async def call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """POST a JSON body and return the JSON content of the answer.

        Raises:
            WrongKeyError: the server has another key.
            EngineError: another status than 200, or the content is not JSON.
            aiohttp.ClientError, OSError: no answer (``NO_ANSWER``).
        """
        content, _ = await self._post(path, body)
        try:
            return json.loads(content) if content else {}
        except ValueError:
            raise EngineError(f"{path}: expected JSON, got {content[:50]!r}") from None

    async def generate(
        self, request_id: str, token_ids: Sequence[int], sampling: Sampling, canary: bool = False
    ) -> Generation:
        """Sample one response. Raises as :meth:`call`; EngineError for a non-finite log-prob."""
        body = {
            "request_id": request_id,
            "token_ids": list(token_ids),
            "sampling": sampling.as_json(),
            "routed_experts": sampling.routed_experts,
        }
        path = f"{PREFIX}/canary" if canary else f"{PREFIX}/generate"
        content, headers = await self._post(path, body)
        arrays = load(content)
        if not np.isfinite(arrays["logprobs"]).all():
            raise EngineError(f"generate: a log-prob of request {request_id!r} is not finite")
        kept = [arrays.pop(name) for name in ("mask_ids", "mask_counts") if name in arrays]
        mask = SamplingMask(*kept) if kept else None
        return Generation(finish_reason=headers["x-finish-reason"], sampling_mask=mask, **arrays)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


def call_once(
    address: str, key: str, path: str, body: dict[str, Any] | None = None, timeout_s: float = 5.0
) -> dict[str, Any]:
    """:meth:`HttpClient.call` from a thread without an event loop. Raises as it does."""

    async def call() -> dict[str, Any]:
        client = HttpClient(address, key)
        try:
            return await asyncio.wait_for(client.call(path, body), timeout_s)
        finally:
            await client.close()

    return asyncio.run(call())
