"""What an environment needs: the protocol, the policy that it samples from, trajectory builders."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from megatron_espo.data.tokenizer import Messages, Tokenizer
from megatron_espo.rollout.engine import Generation, Sampling
from megatron_espo.rollout.pool import EnginePool, concatenate, request_seed
from megatron_espo.types import Prompt, SamplingMask, Trajectory


class NoRoomError(ValueError):
    """The limits of the trajectory leave no token for another turn."""


@dataclass
class Policy:
    """What an environment samples from. Each trajectory has its own.

    Attributes:
        source: answers requests for tokens.
        name: of the trajectory, unique within the run.
        sampling: of the first response. ``max_tokens`` bounds the whole trajectory after its
            prompt. ``seed`` makes every response a function of (seed, number of the call).
        max_model_len: most tokens of context and response together.
        tokenizer: the trainer's.
        calls: number of calls of :meth:`generate`.
    """

    source: EnginePool
    name: str
    sampling: Sampling
    max_model_len: int
    tokenizer: Tokenizer
    calls: int = 0

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self.tokenizer.encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return self.tokenizer.decode(token_ids)

    def render(self, messages: Messages) -> Sequence[int]:
        """Token ids of chat messages in the template, with the assistant's turn opened."""
        return self.tokenizer.encode_prompt(messages)

    async def generate(
        self,
        token_ids: Sequence[int],
        *,
        max_tokens: int | None = None,
        stop_token_ids: Sequence[int] | None = None,
    ) -> Generation:
        """Sample one turn after ``token_ids``.

        The engine aborts a turn when it sleeps or takes new weights. The turn then continues from
        the tokens that it has.

        Args:
            token_ids: the whole context. It begins with the ids of earlier turns exactly as they
                were sampled.
            max_tokens: most tokens of this turn; ``None``: those of a whole trajectory. Turns after
                the first need :meth:`TrajectoryBuilder.room`.
            stop_token_ids: ids that end the turn; ``None``: the tokenizer's end-of-sequence ids.

        Raises:
            NoRoomError: the context leaves no room for a token.
        """
        limit = self.sampling.max_tokens if max_tokens is None else max_tokens
        limit = min(limit, self.max_model_len - len(token_ids))
        if limit < 1:
            raise NoRoomError(f"generate: no room for a turn after {len(token_ids)} tokens")
        call, self.calls = self.calls, self.calls + 1
        stops = self.sampling.stop_token_ids if stop_token_ids is None else tuple(stop_token_ids)
        context, found, done = np.asarray(token_ids).tolist(), None, 0
        while True:
            seed = self.sampling.seed
            if seed is not None and (call, done) != (0, 0):
                seed = request_seed(seed, call, done)
            rest = await self.source.generate(
                f"{self.name}.{call}.{done}",
                context if found is None else context + found.token_ids.tolist(),
                replace(self.sampling, max_tokens=limit - done, seed=seed, stop_token_ids=stops),
            )
            found = concatenate(found, rest)
            done = len(found.token_ids)
            if found.finish_reason != "abort":
                return found
            if done >= limit:
                return replace(found, finish_reason="length")


class Environment(Protocol):
    """Turns a prompt into a trajectory. One object runs all trajectories of a run concurrently.

    An environment may also have a coroutine ``close()``, which is called when the run ends. It is
    cancelled after ten seconds.
    """

    async def rollout(self, prompt: Prompt, policy: Policy) -> Trajectory:
        """Drive the policy from ``prompt`` to the end. An exception counts as a failed attempt."""
        ...


class TrajectoryBuilder:
    """Collects the turns of a trajectory as token ids.

    Args:
        prompt: its ``token_ids`` are the context before the first turn.
    """

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self._earlier: list[Trajectory] = []
        self._begin(prompt.token_ids)

    def _begin(self, prompt_ids: Sequence[int]) -> None:
        self._prompt_ids = [int(token) for token in prompt_ids]
        self._after = _observed([])  # after the prompt
        self._turns: list[int] = []
        self._end = 0  # after the last sampled token

    @property
    def context(self) -> list[int]:
        """Token ids of the prompt and of everything after it."""
        return self._prompt_ids + self._after.token_ids.tolist()

    @property
    def response_ids(self) -> list[int]:
        """Token ids from the first turn up to the last sampled token."""
        return self._after.token_ids[: self._end].tolist()

    def room(self, policy: Policy) -> int:
        """Return the tokens that the limits of the policy leave for the next turn."""
        length = len(self._after.token_ids)
        used = length + sum(len(part.response_ids) for part in self._earlier)
        context = len(self._prompt_ids) + length
        return min(policy.sampling.max_tokens - used, policy.max_model_len - context)

    def add_turn(self, generation: Generation) -> None:
        """Append sampled tokens. They are trained."""
        count = len(generation.token_ids)
        if not len(generation.logprobs) == (generation.versions >= 0).sum() == count:
            raise ValueError("add_turn: expected a log-prob and a version for each token")
        self._turns.append(len(self._after.token_ids))
        self._after = concatenate(self._after, generation)
        self._end = len(self._after.token_ids) if count else self._end

    def add_observation(self, token_ids: Sequence[int]) -> None:
        """Append tokens of the environment. They are not trained."""
        self._after = concatenate(self._after, _observed(token_ids, self._after.routed_experts))

    def set_context(self, token_ids: Sequence[int]) -> None:
        """Continue from a client's history. Tokens after the known ones are an observation.

        The trajectory is split if the history does not begin with the known tokens.
        """
        known, given = self.context, [int(token) for token in token_ids]
        if given[: len(known)] == known:
            self.add_observation(given[len(known) :])
        else:
            if self._turns:
                self._earlier.append(self._part("", "stop"))
            self._begin(given)

    def build(
        self,
        text: str,
        finish_reason: str = "stop",
        *,
        reward: float | None = None,
        rewards: dict[str, float] | None = None,
    ) -> Trajectory:
        """Build the trajectory. Observations after the last turn are dropped.

        Args:
            text: what the reward function scores if ``reward`` is ``None``.
        """
        part, earlier = self._part(text, finish_reason), tuple(self._earlier)
        return replace(part, reward=reward, rewards=rewards or {}, earlier=earlier)

    def _part(self, text: str, finish_reason: str) -> Trajectory:
        found, end = self._after, self._end
        experts, mask = found.routed_experts, found.sampling_mask
        return Trajectory(
            prompt=self.prompt,
            prompt_ids=np.array(self._prompt_ids, np.int32),
            response_ids=found.token_ids[:end],
            loss_mask=found.versions[:end] >= 0,
            logprobs=found.logprobs[:end],
            versions=found.versions[:end],
            finish_reason=finish_reason,
            text=text,
            turns=np.array(self._turns, np.int32),
            routed_experts=None if experts is None else experts[: len(self._prompt_ids) + end - 1],
            sampling_mask=None if mask is None else mask[:end],
        )


def _observed(token_ids: Sequence[int], experts: np.ndarray | None = None) -> Generation:
    """Tokens that no policy sampled, after tokens with these ``experts``."""
    count, ids = len(token_ids), np.array(token_ids, np.int32)
    logprobs, versions = np.zeros(count, np.float32), np.full(count, -1, np.int32)
    return Generation(ids, logprobs, versions, "", experts, SamplingMask.empty(count))


class SingleTurn:
    """Samples one response to each prompt; the reward function scores it."""

    async def rollout(self, prompt: Prompt, policy: Policy) -> Trajectory:
        found, builder = await policy.generate(prompt.token_ids), TrajectoryBuilder(prompt)
        builder.add_turn(found)
        return builder.build(policy.decode(found.token_ids.tolist()), found.finish_reason)


class ChatSession:
    """Answers a client that sends its whole history of messages with every call.

    The chat template turns the history into token ids. Where they begin with the known ids, the
    trajectory continues; elsewhere it is split. Sampled ids are never tokenized again.

    Attributes:
        builder: the trajectory so far.
        last: the last turn; ``None`` before the first.
    """

    def __init__(self, prompt: Prompt, policy: Policy) -> None:
        self.builder = TrajectoryBuilder(prompt)
        self.last: Generation | None = None
        self._policy, self._turn = policy, asyncio.Lock()

    async def reply(self, messages: Messages, max_tokens: int | None = None) -> str:
        """Return the text of the model's next turn. Calls of one session run one at a time.

        Raises:
            NoRoomError: the limits leave no token of context or of the response.
        """
        async with self._turn:
            self.builder.set_context(self._policy.render(messages))
            room = self.builder.room(self._policy)
            limit = min(room, max_tokens or room)
            found = await self._policy.generate(self.builder.context, max_tokens=limit)
            self.builder.add_turn(found)
            self.last = found
            return self._policy.decode(found.token_ids.tolist())
