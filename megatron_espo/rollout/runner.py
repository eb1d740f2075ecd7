"""Loads the environment of a run and runs it: one coroutine for each trajectory."""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from megatron_espo.data.tokenizer import Tokenizer
from megatron_espo.errors import InputError, log_first
from megatron_espo.plugins import load_object
from megatron_espo.rollout.engine import Generation, Sampling
from megatron_espo.rollout.environments import Environment, Policy, SingleTurn, TrajectoryBuilder
from megatron_espo.rollout.http_client import LoopThread
from megatron_espo.rollout.pool import EnginePool
from megatron_espo.rollout.tools import ToolEnvironment
from megatron_espo.rollout.verifiers import VerifiersEnvironment
from megatron_espo.types import Prompt, Trajectory

logger = logging.getLogger(__name__)

MOST_CONCURRENT = 4096
ATTEMPTS = 2  # at one trajectory


def load_environment(name: str, arguments: dict[str, Any]) -> Environment:
    """Build the environment of a configuration.

    Args:
        name: ``single_turn``, ``tool``, ``verifiers:<id>``, or ``module:Class``.
        arguments: keyword arguments of the class.

    Raises:
        InputError: no environment has that name, or the class rejects the arguments.
    """
    known: dict[str, Any] = {"single_turn": SingleTurn, "tool": ToolEnvironment}
    if name.startswith("verifiers:"):
        found: Any = partial(VerifiersEnvironment, name.removeprefix("verifiers:"))
    else:
        names = f"{', '.join(known)}, verifiers:<id> or module:Class"
        found = known.get(name) or load_object("environment.name", name, names)
    try:
        return found(**arguments)
    except TypeError as error:
        raise InputError(f"environment.args: {name} refused {arguments}: {error}") from None


@dataclass
class EnvironmentRunner:
    """Starts trajectories from other threads.

    Attributes:
        environment: drives the policy.
        source: answers requests for tokens.
        tokenizer: the trainer's.
        loop: event loop.
        timeout_s: of one attempt at a trajectory; ``None``: no limit.
        max_model_len: tokens of context and response together.
        routed_experts: whether trajectories carry the experts of each token.
        failures: number of failed attempts by type of the exception.
    """

    environment: Environment
    source: EnginePool
    tokenizer: Tokenizer
    loop: LoopThread
    timeout_s: float | None
    max_model_len: int
    routed_experts: bool = False
    failures: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._semaphore = asyncio.Semaphore(MOST_CONCURRENT)

    def start(
        self, prompt: Prompt, name: str, sampling: Sampling, seeds: Sequence[int]
    ) -> list[Future[Trajectory]]:
        """Start a trajectory for each seed. ``name`` is unique among those in flight."""
        sampling = replace(sampling, routed_experts=self.routed_experts)
        return [
            self.loop.submit(self._run(prompt, f"{name}.{i}", replace(sampling, seed=seed)))
            for i, seed in enumerate(seeds)
        ]

    async def _run(self, prompt: Prompt, name: str, sampling: Sampling) -> Trajectory:
        async with self._semaphore:
            for attempt in range(ATTEMPTS):
                policy = Policy(
                    self.source, f"{name}.{attempt}", sampling, self.max_model_len, self.tokenizer
                )
                try:
                    rollout = self.environment.rollout(prompt, policy)
                    found = await asyncio.wait_for(rollout, self.timeout_s)
                    _check(found)
                    return found
                except InputError:
                    raise
                except Exception as error:
                    message = f"environment: prompt {prompt.id!r}: {error}"
                    log_first(logger, self.failures, type(error).__name__, message)
        # The placeholder's token is not trained: its reward is NaN.
        token = np.array([next(iter(sampling.stop_token_ids), 0)], np.int32)
        logprobs, versions = np.zeros(1, np.float32), np.full(1, -1, np.int32)
        turns = TrajectoryBuilder(prompt)
        turns.add_turn(Generation(token, logprobs, versions, "failed"))
        return turns.build("", "failed", reward=float("nan"))


def _check(trajectory: Trajectory) -> None:
    for part in trajectory.parts:
        if not part.loss_mask.any():
            raise ValueError("trajectory: expected a sampled token in each part, got none")
        if (part.versions[part.loss_mask] < 0).any():
            raise ValueError("trajectory: expected a policy version for each sampled token, got -1")
