"""All servers of a run behind one ``generate``, on rank 0."""

import asyncio
import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from megatron_espo.rollout.engine import EngineError, Generation, Sampling
from megatron_espo.rollout.http_client import NO_ANSWER, HttpClient
from megatron_espo.rollout.server import run_key
from megatron_espo.types import Prompt


class EnginePool:
    """Spreads requests over servers and holds requests while a server is down.

    A request that fails is held until :meth:`connect` sets the servers, then sent again with the
    same seed. Meanwhile :attr:`failure` gives the reason. Coroutines run on the event loop.

    Args:
        folder: of the run.
        timeout_s: a server counts as failed if requests wait this long and none is answered.
        host_timeout_s: a server counts as failed if its machine does not respond for this time.
    """

    def __init__(self, folder: str, timeout_s: float, host_timeout_s: float = 60.0) -> None:
        self._key, self._timeout_s = run_key(folder), timeout_s
        self._host_timeout_s = host_timeout_s
        self._clients: list[HttpClient] = []
        self._connected = asyncio.Event()
        self._in_flight = 0
        self._last_reply = time.monotonic()
        self._failure: EngineError | None = None

    async def connect(self, addresses: Sequence[str]) -> None:
        """Use these servers from now on and send held requests again."""
        known = [client.address for client in self._clients]
        if self._failure is not None or known != list(addresses):
            for client in self._clients:
                await client.close()
            rest = (self._key, self._host_timeout_s)
            self._clients = [HttpClient(address, *rest) for address in addresses]
        self._failure, self._last_reply = None, time.monotonic()
        self._connected.set()

    async def generate(
        self, request_id: str, token_ids: Sequence[int], sampling: Sampling
    ) -> Generation:
        """Sample one response; retries after failures of servers."""
        attempts = itertools.count()
        while True:
            await self._connected.wait()
            client = self._clients[sampling.slot % len(self._clients)]
            if not self._in_flight:
                self._last_reply = time.monotonic()
            self._in_flight += 1
            try:
                found = await client.generate(f"{request_id}.{next(attempts)}", token_ids, sampling)
                self._last_reply = time.monotonic()
                return found
            except (EngineError, *NO_ANSWER) as error:
                if client in self._clients:  # else the pool does not use it any more
                    reason = f"generate: the server at {client.address} failed: {error}"
                    self._failure = self._failure or EngineError(reason)
                    self._connected.clear()
            finally:
                self._in_flight -= 1

    @property
    def failure(self) -> EngineError | None:
        """Why requests are held; ``None``: they are not held."""
        quiet = time.monotonic() - self._last_reply
        if self._failure is None and self._in_flight and quiet > self._timeout_s:
            limit = f"{self._timeout_s:g} s (rollout.timeout_s)"
            self._failure = EngineError(f"generate: no response in {limit}")
        return self._failure

    def check(self) -> None:
        """Raise :attr:`failure`, if there is one."""
        if failure := self.failure:
            raise failure

    async def close(self) -> None:
        for client in self._clients:
            await client.close()


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
    return Generation(
        np.concatenate([first.token_ids, rest.token_ids]),
        np.concatenate([first.logprobs, rest.logprobs]),
        np.concatenate([first.versions, rest.versions]),
        rest.finish_reason,
        experts,
    )
