"""What an engine is asked for, and when it may end. Standard library only."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from megatron_espo.types import Prompt


class Request(NamedTuple):
    """One response, or the rest of one.

    Attributes:
        token_ids: prompt, and what there is of the response.
        seed: None: the engine's running generator.
        max_tokens: most tokens to sample.
        prompt: number of its prompt among those of the call.
    """

    token_ids: tuple[int, ...]
    seed: int | None
    max_tokens: int
    prompt: int = 0


class Enough(NamedTuple):
    """A call may end when ``prompts`` of its prompts have all their responses, the first ``first`` of them among these."""

    prompts: int
    first: int = 0

    def share(self, number: int, count: int) -> "Enough":
        """Of one of ``count`` engines to which prompts are dealt in turn."""
        return Enough(*(len(range(number, limit, count)) for limit in self))


class Countdown:
    """Whether what :class:`Enough` asks for is there, as ``requests`` are finished one by one."""

    def __init__(self, enough: Enough, requests: Sequence[Request]) -> None:
        self._open = Counter(request.prompt for request in requests)
        self._prompts = enough.prompts
        self._first = {prompt for prompt in self._open if prompt < enough.first}

    @property
    def is_over(self) -> bool:
        """Whether the call may end."""
        return self._prompts <= 0 and not self._first

    def finish(self, request: Request) -> None:
        """Note that a request is finished."""
        self._open[request.prompt] -= 1
        if not self._open[request.prompt]:
            self._prompts -= 1
            self._first.discard(request.prompt)


def request_seeds(prompts: Sequence[Prompt], group_size: int, seed: int | None) -> list[list[int | None]]:
    """A 63-bit seed for each response: a hash of (seed, prompt id, occurrence of that id, position in the group)."""
    if seed is None:
        return [[None] * group_size for _ in prompts]
    seen: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        key = f"{seed}:{prompt.id}:{seen[prompt.id]}"
        seen[prompt.id] += 1
        digests = (hashlib.blake2b(f"{key}:{j}".encode(), digest_size=8).digest() for j in range(group_size))
        seeds.append([int.from_bytes(digest, "little") >> 1 for digest in digests])
    return seeds
