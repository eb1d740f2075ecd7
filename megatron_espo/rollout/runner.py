"""Runs environments: one coroutine for each trajectory, on the event loop, with limits, retries and counted failures."""

import asyncio
import collections
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from megatron_espo.data.tokenizer import Tokenizer
from megatron_espo.errors import InputError
from megatron_espo.rollout.engine import Sampling, TokenSource
from megatron_espo.rollout.environments import Environment, Policy
from megatron_espo.rollout.http_client import LoopThread
from megatron_espo.types import Prompt, Trajectory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunnerConfig:
    """Limits of the environments.

    Attributes:
        max_concurrent: most trajectories at the same time.
        timeout_s: seconds for one trajectory; ``None``: no limit.
        retries: further attempts at a trajectory whose environment failed.
        max_model_len: tokens of context and response together.
        routed_experts: whether trajectories carry the experts of each token.
    """

    max_concurrent: int
    timeout_s: float | None
    retries: int
    max_model_len: int
    routed_experts: bool = False


class EnvironmentRunner:
    """Starts trajectories from other threads.

    Args:
        environment: drives the policy.
        source: answers requests for tokens.
        tokenizer: the trainer's.
        loop: event loop.
        config: limits.

    Attributes:
        failures: number of failed attempts by type of the exception.
    """

    def __init__(
        self, environment: Environment, source: TokenSource, tokenizer: Tokenizer, loop: LoopThread, config: RunnerConfig
    ) -> None:
        self._environment, self._source, self._tokenizer = environment, source, tokenizer
        self._loop, self._config = loop, config
        self._limit = asyncio.Semaphore(config.max_concurrent)
        self.failures: collections.Counter[str] = collections.Counter()

    def start(self, prompt: Prompt, name: str, seed: int | None, sampling: Sampling, slot: int = 0) -> Future[Trajectory]:
        """Begin one trajectory.

        Args:
            name: unique among the trajectories in flight.
            slot: see ``TokenSource.generate``.
        """
        return self._loop.submit(self._run(prompt, name, seed, sampling, slot))

    async def _run(self, prompt: Prompt, name: str, seed: int | None, sampling: Sampling, slot: int) -> Trajectory:
        async with self._limit:
            for attempt in range(self._config.retries + 1):
                policy = Policy(
                    source=self._source,
                    name=f"{name}.{attempt}",
                    seed=seed,
                    sampling=sampling,
                    max_model_len=self._config.max_model_len,
                    slot=slot,
                    routed_experts=self._config.routed_experts,
                    encode=self._tokenizer.encode,
                    decode=self._tokenizer.decode,
                    render=self._tokenizer.encode_prompt,
                )
                try:
                    found = await asyncio.wait_for(self._environment.rollout(prompt, policy), self._config.timeout_s)
                    _check(found)
                    return found
                except InputError:
                    raise
                except Exception as error:
                    kind = type(error).__name__
                    if not self.failures[kind]:
                        logger.warning(
                            "the environment failed at prompt %r (%s: %s); later failures are only counted",
                            prompt.id, kind, error,
                        )  # fmt: skip
                    self.failures[kind] += 1
        return failed_trajectory(prompt, next(iter(sampling.stop_token_ids), 0))


def failed_trajectory(prompt: Prompt, token_id: int) -> Trajectory:
    """Stands for a trajectory whose environment failed: counted like a failed verifier (reward NaN), never trained."""
    return Trajectory(
        prompt=prompt,
        prompt_ids=np.array(prompt.token_ids, np.int32),
        response_ids=np.array([token_id], np.int32),
        loss_mask=np.array([True]),
        logprobs=np.zeros(1, np.float32),
        versions=np.full(1, -1, np.int32),
        finish_reason="failed",
        text="",
        turns=np.zeros(1, np.int32),
        reward=float("nan"),
    )


def _check(trajectory: Trajectory) -> None:
    for part in (*trajectory.earlier, trajectory):
        if not part.loss_mask.any():
            raise ValueError("expected at least one sampled token in each part of a trajectory, got none")
        if (part.versions[part.loss_mask] < 0).any():
            raise ValueError("expected a policy version for each sampled token, got none for some")


def run_all(
    runner: EnvironmentRunner,
    prompts: Sequence[Prompt],
    samples: int,
    seeds: Sequence[Sequence[int | None]],
    sampling: Sampling,
    name: str,
    on_progress: Callable[[int, int], None],
) -> list[list[Trajectory]]:
    """``samples`` trajectories of each prompt; waits for all of them.

    Args:
        seeds: one for each trajectory, ``[prompt][sample]``.
        on_progress: called with (finished, all) several times a second; what it raises cancels the rest.
    """
    futures = [
        runner.start(prompt, f"{name}.{i}.{j}", seeds[i][j], sampling, slot=i)
        for i, prompt in enumerate(prompts)
        for j in range(samples)
    ]
    try:
        while True:
            finished = sum(future.done() for future in futures)
            on_progress(finished, len(futures))
            if finished == len(futures):
                break
            _wait_a_moment(futures)
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    found = [future.result() for future in futures]
    return [found[i : i + samples] for i in range(0, len(found), samples)]


def _wait_a_moment(futures: Sequence[Future]) -> None:
    from concurrent.futures import FIRST_COMPLETED, wait

    wait([future for future in futures if not future.done()], timeout=0.25, return_when=FIRST_COMPLETED)
