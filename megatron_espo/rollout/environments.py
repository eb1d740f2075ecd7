"""Environments: coroutines that drive the policy from a prompt to a trajectory."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from megatron_espo.errors import InputError
from megatron_espo.rollout.engine import Generation, Sampling, TokenSource
from megatron_espo.rollout.pool import concatenate, request_seed
from megatron_espo.types import Prompt, Trajectory


@dataclass
class Policy:
    """What an environment samples from. One for each trajectory.

    Attributes:
        max_response_tokens: most tokens that the whole trajectory may have after its prompt.
        max_model_len: most tokens of context and response together.
        encode: text -> token ids, without special tokens.
        decode: token ids -> text, without special tokens.
        render: chat messages -> token ids of the template with the assistant's turn opened.
        source: answers requests for tokens.
        name: of the trajectory, unique within the run.
        seed: makes every response a function of (seed, number of the call). ``None``: the engine's running generator.
        sampling: temperature and limits; see :class:`Sampling`.
        slot: trajectories with the same slot go to the same server.
        routed_experts: whether to return the experts of each token.
    """

    source: TokenSource
    name: str
    seed: int | None
    sampling: Sampling
    max_model_len: int
    slot: int = 0
    routed_experts: bool = False
    encode: Callable[[str], list[int]] | None = None
    decode: Callable[[Sequence[int]], str] | None = None
    render: Callable[[list[dict[str, str]]], list[int]] | None = None
    calls: int = 0

    @property
    def max_response_tokens(self) -> int:
        return self.sampling.max_tokens

    async def generate(
        self, token_ids: Sequence[int], *, max_tokens: int | None = None, stop_token_ids: Sequence[int] | None = None
    ) -> Generation:
        """Sample one turn after ``token_ids``.

        A turn that was aborted (the engine sleeps, or takes new weights) is continued from the tokens that it has.

        Args:
            token_ids: the whole context. It begins with the ids of earlier turns exactly as they were sampled.
            max_tokens: most tokens of this turn; ``None``: what the trajectory's limit leaves.
            stop_token_ids: ids that end the turn; ``None``: the tokenizer's end-of-sequence ids.

        Raises:
            ValueError: the context leaves no room for a token.
        """
        call, self.calls = self.calls, self.calls + 1
        limit = min(self.sampling.max_tokens if max_tokens is None else max_tokens, self.max_model_len - len(token_ids))
        if limit < 1:
            raise ValueError(f"generate: {len(token_ids)} tokens of context leave no room in {self.max_model_len}")
        context, found = np.asarray(token_ids).tolist(), None
        while True:
            done = 0 if found is None else len(found.token_ids)
            sampling = replace(
                self.sampling,
                max_tokens=limit - done,
                seed=self._seed_of(call, done),
                stop_token_ids=self.sampling.stop_token_ids if stop_token_ids is None else tuple(stop_token_ids),
            )
            found = concatenate(
                found,
                await self.source.generate(
                    f"{self.name}.{call}.{done}",
                    context if found is None else context + found.token_ids.tolist(),
                    sampling,
                    slot=self.slot,
                    routed_experts=self.routed_experts,
                ),
            )
            if found.finish_reason != "abort":
                return found
            if len(found.token_ids) >= limit:
                return replace(found, finish_reason="length")

    def _seed_of(self, call: int, done: int) -> int | None:
        if self.seed is None or (call, done) == (0, 0):
            return self.seed
        return request_seed(self.seed, call, done)


class Environment(Protocol):
    """Turns a prompt into a trajectory. One object serves all trajectories of a run, many at the same time.

    An environment may also have a coroutine ``close()``, which is called when the run ends.
    """

    async def rollout(self, prompt: Prompt, policy: Policy) -> Trajectory:
        """Drive the policy from ``prompt`` to the end. What it raises is counted like a failed verifier."""


class SingleTurn:
    """One response to each prompt; the reward function judges it."""

    async def rollout(self, prompt: Prompt, policy: Policy) -> Trajectory:
        found = await policy.generate(prompt.token_ids)
        return Trajectory.single_turn(
            prompt,
            found.token_ids,
            found.logprobs,
            found.versions,
            found.finish_reason,
            policy.decode(found.token_ids.tolist()),
            routed_experts=found.routed_experts,
        )


class TrajectoryBuilder:
    """Collects the turns of a trajectory, token by token as they were sampled.

    Args:
        prompt: the row.
        prompt_ids: context before the first turn; ``None``: the prompt's own.
    """

    def __init__(self, prompt: Prompt, prompt_ids: Sequence[int] | None = None) -> None:
        self.prompt = prompt
        self._prompt_ids = [int(token) for token in (prompt.token_ids if prompt_ids is None else prompt_ids)]
        self._earlier: list[Trajectory] = []
        self._clear()

    def _clear(self) -> None:
        self._ids: list[int] = []
        self._mask: list[bool] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self._turns: list[int] = []
        self._experts: np.ndarray | None = None

    @property
    def context(self) -> list[int]:
        """Token ids of the prompt and of everything after it."""
        return self._prompt_ids + self._ids

    @property
    def response_ids(self) -> list[int]:
        """Token ids after the context before the first turn, up to the last sampled token."""
        return self._ids[: self._end]

    @property
    def _end(self) -> int:
        return 1 + max((i for i, sampled in enumerate(self._mask) if sampled), default=-1)

    @property
    def splits(self) -> int:
        """How often the trajectory was split."""
        return len(self._earlier)

    def room(self, policy: Policy) -> int:
        """Tokens that the limits of the policy leave for the next turn."""
        used = len(self._ids) + sum(len(part.response_ids) for part in self._earlier)
        return min(policy.max_response_tokens - used, policy.max_model_len - len(self.context))

    def add_turn(self, generation: Generation) -> None:
        """Append sampled tokens, which are trained."""
        self._turns.append(len(self._ids))
        self._ids += generation.token_ids.tolist()
        self._mask += [True] * len(generation.token_ids)
        self._logprobs += generation.logprobs.tolist()
        self._versions += generation.versions.tolist()
        earlier, experts = self._experts, generation.routed_experts
        if earlier is not None and experts is not None:
            experts = np.concatenate([earlier, experts[len(earlier) :]])
        self._experts = experts

    def add_observation(self, token_ids: Sequence[int]) -> None:
        """Append tokens of the environment, which are not trained."""
        self._ids += [int(token) for token in token_ids]
        self._mask += [False] * len(token_ids)
        self._logprobs += [0.0] * len(token_ids)
        self._versions += [-1] * len(token_ids)

    def set_context(self, token_ids: Sequence[int]) -> bool:
        """Continue from a client's history. Tokens after the known ones are an observation.

        Returns:
            Whether the trajectory had to be split, because the history does not begin with the tokens that were sampled.
        """
        known, given = self.context, [int(token) for token in token_ids]
        if given[: len(known)] == known:
            self.add_observation(given[len(known) :])
            return False
        split = bool(self._turns)
        if split:
            self._earlier.append(self._part("", "stop"))
        self._prompt_ids = given
        self._clear()
        return split

    def build(
        self,
        text: str,
        finish_reason: str = "stop",
        *,
        reward: float | None = None,
        rewards: dict[str, float] | None = None,
    ) -> Trajectory:
        """The trajectory. Observations after the last turn are dropped.

        Args:
            text: what the reward function judges where ``reward`` is ``None``.
        """
        part = self._part(text, finish_reason)
        return replace(part, reward=reward, rewards=dict(rewards or {}), earlier=tuple(self._earlier))

    def _part(self, text: str, finish_reason: str) -> Trajectory:
        stop = self._end
        return Trajectory(
            prompt=self.prompt,
            prompt_ids=np.array(self._prompt_ids, np.int32),
            response_ids=np.array(self._ids[:stop], np.int32),
            loss_mask=np.array(self._mask[:stop], bool),
            logprobs=np.array(self._logprobs[:stop], np.float32),
            versions=np.array(self._versions[:stop], np.int32),
            finish_reason=finish_reason,
            text=text,
            turns=np.array(self._turns, np.int32),
            routed_experts=None if self._experts is None else self._experts[: len(self._prompt_ids) + stop - 1],
        )


def load_environment(name: str, arguments: dict[str, Any]) -> Environment:
    """The environment of a configuration.

    Args:
        name: ``single_turn``, ``tool``, ``verifiers:<id>``, or ``module:Class``.
        arguments: keyword arguments of the class.

    Raises:
        InputError: there is none of that name, or it refuses the arguments.
    """
    if name == "single_turn":
        found = SingleTurn
    elif name == "tool":
        from megatron_espo.rollout.tools import ToolEnvironment as found
    elif name.startswith("verifiers:"):
        from megatron_espo.rollout.verifiers import VerifiersEnvironment

        found = VerifiersEnvironment
        arguments = {"environment_id": name.removeprefix("verifiers:")} | arguments
    else:
        module, _, attribute = name.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise InputError(f"environment.name: expected single_turn, tool, verifiers:<id> or module:Class, got {name!r} ({error})") from None
    try:
        return found(**arguments)
    except TypeError as error:
        raise InputError(f"environment.args: {name} refused {arguments}: {error}") from None
