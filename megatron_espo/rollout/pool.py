"""All servers of a run behind one ``generate``, on rank 0."""

import asyncio
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Sequence

import aiohttp
import numpy as np

from megatron_espo.rollout.engine import EngineError, Generation, Sampling
from megatron_espo.rollout.http_client import HttpClient
from megatron_espo.rollout.server import PREFIX, read_key, run_key_file
from megatron_espo.types import Prompt

_HEALTH_SECONDS = 30.0

logger = logging.getLogger(__name__)


class EnginePool:
    """Spreads requests over servers and holds them while a server is down.

    A request that a failed server had is sent again, with the same seed, once :meth:`connect` brings servers back; until then
    :attr:`failure` says what happened. All methods but the constructor run on the event loop.

    Args:
        key: of the run.
        timeout_s: without an answer for so long, while requests wait, a server counts as failed.
        host_timeout_s: without contact for so long, a server on another machine counts as failed.

    Attributes:
        failure: why requests are held; ``None``: they are not.
    """

    def __init__(self, key: str, timeout_s: float, host_timeout_s: float = 60.0) -> None:
        self._key, self._timeout_s, self._host_timeout_s = key, timeout_s, host_timeout_s
        self._clients: list[HttpClient] = []
        self._connected = asyncio.Event()
        self._in_flight = 0
        self._news = time.monotonic()
        self._watcher: asyncio.Task | None = None
        self.failure: EngineError | None = None

    async def connect(self, addresses: Sequence[str]) -> None:
        """Use these servers from now on; requests that were held go on."""
        if self.failure is not None or [client.address for client in self._clients] != list(addresses):
            for client in self._clients:
                await client.close()
            self._clients = [HttpClient(address, self._key, self._host_timeout_s) for address in addresses]
        self.failure, self._news = None, time.monotonic()
        self._connected.set()
        if self._watcher is None:
            self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def generate(
        self, request_id: str, token_ids: Sequence[int], sampling: Sampling, *, slot: int = 0, routed_experts: bool = False
    ) -> Generation:
        """Sample one response, on whichever server has it, whatever happens to servers meanwhile."""
        attempt = 0
        while True:
            await self._connected.wait()
            client = self._clients[slot % len(self._clients)]
            self._in_flight += 1
            try:
                found = await client.generate(
                    f"{request_id}.{attempt}", token_ids, sampling, routed_experts=routed_experts
                )
                self._news = time.monotonic()
                return found
            except (EngineError, aiohttp.ClientError, OSError) as error:
                if client in self._clients:
                    self._fail(f"generate: the server at {client.address} failed: {error}")
            finally:
                self._in_flight -= 1
            attempt += 1

    async def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        for client in self._clients:
            await client.close()

    def _fail(self, why: str) -> None:
        if self.failure is None:
            self.failure = EngineError(why)
        self._connected.clear()

    async def _watch(self) -> None:
        """Ask servers for a sign of life while requests wait without an answer. vLLM's ``/health`` does not see a stopped worker."""
        while True:
            await asyncio.sleep(min(1.0, self._timeout_s / 10))
            quiet = time.monotonic() - self._news
            if not (self._connected.is_set() and self._in_flight):
                self._news = time.monotonic()
            elif quiet > self._timeout_s:
                self._fail(f"generate: no response in {self._timeout_s:g} s (rollout.timeout_s)")
            elif quiet > _HEALTH_SECONDS and int(quiet / _HEALTH_SECONDS) > int((quiet - 1.0) / _HEALTH_SECONDS):
                await self._ping()

    async def _ping(self) -> None:
        for client in list(self._clients):
            call = client.call(f"{PREFIX}/worker", {"method": "ping", "timeout": self._timeout_s})
            try:
                await asyncio.wait_for(call, min(60.0, self._timeout_s))
            except (TimeoutError, EngineError, aiohttp.ClientError, OSError) as error:
                if client in self._clients and self._connected.is_set():
                    self._fail(f"generate: the server at {client.address} does not answer: {error!r}")


async def connected_pool(folder: str, timeout_s: float, addresses: Sequence[str], host_timeout_s: float = 60.0) -> EnginePool:
    """A pool of the run in ``folder``, with the servers at ``addresses`` (there may be none yet)."""
    pool = EnginePool(read_key(run_key_file(folder)), timeout_s, host_timeout_s)
    if addresses:
        await pool.connect(addresses)
    return pool


def request_seeds(prompts: Sequence[Prompt], samples: int, seed: int) -> list[list[int]]:
    """A seed for each response: of the prompt's id, the occurrence of that id, and the position in the group."""
    seen: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        seeds.append([request_seed(seed, prompt.id, seen[prompt.id], j) for j in range(samples)])
        seen[prompt.id] += 1
    return seeds


def request_seed(seed: int, *key: object) -> int:
    """A 63-bit seed: a hash of a seed and of what is sampled with it."""
    digest = hashlib.blake2b(":".join(map(str, (seed, *key))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def concatenate(first: Generation | None, rest: Generation) -> Generation:
    """A response that was continued. The experts of its earlier tokens are those with which they were sampled."""
    if first is None:
        return rest
    experts = rest.routed_experts
    if first.routed_experts is not None and experts is not None:
        experts = np.concatenate([first.routed_experts, experts[len(first.routed_experts) :]])
    joined = (np.concatenate(pair) for pair in (
        (first.token_ids, rest.token_ids), (first.logprobs, rest.logprobs), (first.versions, rest.versions),
    ))  # fmt: skip
    return Generation(*joined, rest.finish_reason, experts)
