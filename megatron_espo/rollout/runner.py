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
CLOSE_SECONDS = 10.0
_FLOAT32_MAX = float(np.finfo(np.float32).max)


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


def close_environment(environment: Environment, loop: LoopThread) -> None:
    """Call the ``close()`` of an environment that has one, for at most ``CLOSE_SECONDS``.

    Prints a failure instead of raising it, so that results and checkpoints are still saved. Call it
    after everything else that uses the loop is closed: ``close()`` may block the loop.
    """
    if close := getattr(environment, "close", None):
        try:
            loop.run(close(), CLOSE_SECONDS)
        except (Exception, SystemExit) as error:
            print(f"warning: environment: close() failed: {error!r}", flush=True)


@dataclass
class EnvironmentRunner:
    """Starts trajectories from other threads.

    Attributes:
        environment: drives the policy.
        source: answers requests for tokens.
        tokenizer: the trainer's.
        loop: event loop.
        timeout_s: of one attempt at a trajectory; ``None``: no limit. An attempt that fails because
            requests were held is repeated and not counted.
        max_model_len: tokens of context and response together.
        routed_experts: whether trajectories carry the experts of each token.
        failures: number of failed attempts by type of the exception.
        last_failure: message of the latest failed attempt.
    """

    environment: Environment
    source: EnginePool
    tokenizer: Tokenizer
    loop: LoopThread
    timeout_s: float | None
    max_model_len: int
    routed_experts: bool = False
    failures: Counter[str] = field(default_factory=Counter)
    last_failure: str = ""

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
            failed = 0
            while failed < ATTEMPTS:
                await self.source.connected.wait()
                holds = self.source.holds
                own_name = f"{name}.{failed}.{holds}"
                policy = Policy(self.source, own_name, sampling, self.max_model_len, self.tokenizer)
                try:
                    async with asyncio.timeout(self.timeout_s) as limit:
                        found = await self.environment.rollout(prompt, policy)
                    _check(found, sampling.max_tokens)
                    return found
                except InputError:
                    raise
                except (Exception, SystemExit) as error:  # SystemExit: of code that a model wrote
                    if self.source.holds > holds:
                        continue
                    failed += 1
                    late = f"no result in {self.timeout_s} s (environment.timeout_s)"
                    cause = late if limit.expired() else f"{type(error).__name__}: {error}"
                    self.last_failure = f"prompt {prompt.id!r}: {cause}"
                    message = f"environment: {self.last_failure}"
                    log_first(logger, self.failures, type(error).__name__, message)
        # The placeholder's token is not trained: its reward is NaN.
        token = np.array([next(iter(sampling.stop_token_ids), 0)], np.int32)
        logprobs, versions = np.zeros(1, np.float32), np.zeros(1, np.int32)
        turns = TrajectoryBuilder(prompt)
        turns.add_turn(Generation(token, logprobs, versions, "failed"))
        return turns.build("", "failed", reward=float("nan"))


def _check(trajectory: Trajectory, max_tokens: int) -> None:
    for part in trajectory.parts:
        if not part.loss_mask.any():
            raise ValueError("trajectory: expected a sampled token in each part, got none")
        if (part.versions[part.loss_mask] < 0).any():
            raise ValueError("trajectory: expected a policy version for each sampled token, got -1")
    if (length := sum(len(part.response_ids) for part in trajectory.parts)) > max_tokens:
        limit = f"rollout.max_response_tokens = {max_tokens} (TrajectoryBuilder.room)"
        raise ValueError(f"trajectory: expected tokens up to {limit}, got {length}")
    for name, value in (("reward", trajectory.reward), *trajectory.rewards.items()):
        if value is not None and abs(float(value)) > _FLOAT32_MAX:
            raise ValueError(f"trajectory: expected {name} finite in float32, got {value}")
