"""All servers of a run behind one ``generate``, on rank 0."""

import asyncio
import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_espo.rollout.engine import TOKEN_FIELDS, EngineError, Generation, Sampling
from megatron_espo.rollout.http_client import NO_ANSWER, HttpClient
from megatron_espo.rollout.server import PREFIX, run_key
from megatron_espo.types import Prompt, SamplingMask

_PING_SECONDS = 30.0


class EnginePool:
    """Spreads requests over servers and holds requests while a server is down.

    A request that fails is held until :meth:`connect` sets the servers, then sent again with the
    same seed. Meanwhile :attr:`failure` gives the reason. All methods except the constructor run
    on the event loop.

    Args:
        folder: of the run.
        timeout_s: a server counts as failed if requests wait this long and none is answered.
        host_timeout_s: a server counts as failed if its machine does not respond for this time.

    Attributes:
        failure: why requests are held; ``None``: they are not held.
        holds: how often requests have been held.
        connected: set while they are not held.
    """

    def __init__(self, folder: str, timeout_s: float, host_timeout_s: float = 60.0) -> None:
        self._key, self._timeout_s = run_key(folder), timeout_s
        self._host_timeout_s = host_timeout_s
        self._clients: list[HttpClient] = []
        self.connected, self.holds = asyncio.Event(), 0
        self._in_flight = 0
        self._last_reply = time.monotonic()
        self._watcher: asyncio.Task | None = None
        self.failure: EngineError | None = None

    async def connect(self, addresses: Sequence[str]) -> None:
        """Use these servers from now on and send held requests again."""
        known = [client.address for client in self._clients]
        if self.failure is not None or known != list(addresses):
            for client in self._clients:
                await client.close()
            limit = self._host_timeout_s
            self._clients = [HttpClient(address, self._key, limit) for address in addresses]
        self.failure, self._last_reply = None, time.monotonic()
        self.connected.set()
        if self._watcher is None:
            self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def generate(
        self, request_id: str, token_ids: Sequence[int], sampling: Sampling
    ) -> Generation:
        """Sample one response; retries after failures of servers."""
        attempts = itertools.count()
        while True:
            await self.connected.wait()
            client = self._clients[sampling.slot % len(self._clients)]
            self._in_flight += 1
            try:
                found = await client.generate(f"{request_id}.{next(attempts)}", token_ids, sampling)
                self._last_reply = time.monotonic()
                return found
            except (EngineError, *NO_ANSWER) as error:
                self._fail(f"the server at {client.address} failed: {error}", client)
            finally:
                self._in_flight -= 1

    def check(self) -> None:
        """Raise :attr:`failure`, if there is one."""
        if self.failure is not None:
            raise self.failure

    async def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        for client in self._clients:
            await client.close()

    def _fail(self, reason: str, client: HttpClient | None = None) -> None:
        """Hold requests. A failure of a ``client`` that the pool no longer uses does not count."""
        if client is None or client in self._clients:
            self.holds += self.failure is None
            self.failure = self.failure or EngineError(f"generate: {reason}")
            self.connected.clear()

    async def _watch(self) -> None:
        """Ping servers while requests wait. vLLM's ``/health`` does not detect stopped workers."""
        pings = 0.0
        while True:
            await asyncio.sleep(min(1.0, self._timeout_s / 10))
            if not (self.connected.is_set() and self._in_flight):
                self._last_reply = time.monotonic()
            quiet = time.monotonic() - self._last_reply
            if quiet > self._timeout_s:
                self._fail(f"no response in {self._timeout_s:g} s (rollout.timeout_s)")
            due = quiet // _PING_SECONDS > pings
            pings = quiet // _PING_SECONDS
            for client in list(self._clients) if due else ():
                call = client.call(f"{PREFIX}/worker/ping", {"timeout": self._timeout_s})
                try:
                    await asyncio.wait_for(call, min(60.0, self._timeout_s))
                except (EngineError, *NO_ANSWER) as error:
                    self._fail(f"the server at {client.address} does not answer: {error!r}", client)


def request_seeds(prompts: Sequence[Prompt], samples: int, seed: int) -> list[list[int]]:
    """Seeds ``[prompts][samples]``, hashes of prompt id, occurrence of the id and sample index."""
    seen: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        seeds.append([request_seed(seed, prompt.id, seen[prompt.id], j) for j in range(samples)])
        seen[prompt.id] += 1
    return seeds


def request_seed(seed: int, *key: object) -> int:
    """A 63-bit seed: hash of ``seed`` and ``key``."""
    digest = hashlib.blake2b(":".join(map(str, (seed, *key))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def concatenate(first: Generation | None, rest: Generation) -> Generation:
    """Join a partial response and its continuation. Earlier tokens keep their recorded experts."""
    if first is None:
        return rest
    experts = rest.routed_experts
    if first.routed_experts is not None and experts is not None:
        experts = np.concatenate([first.routed_experts, experts[len(first.routed_experts) :]])
    mask = SamplingMask.concatenate([first.sampling_mask, rest.sampling_mask])
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(first, name), getattr(rest, name)]) for name in TOKEN_FIELDS
    }
    return replace(rest, **joined, routed_experts=experts, sampling_mask=mask)
