"""Scores trajectories with the weighted sum of reward functions and judges."""

import asyncio
from concurrent.futures import Future
from dataclasses import replace

from megatron_espo.config import Config
from megatron_espo.data.tokenizer import Tokenizer
from megatron_espo.errors import InputError
from megatron_espo.rewards.judge import JudgeClient
from megatron_espo.rewards.pool import RewardPool
from megatron_espo.rollout.http_client import LoopThread
from megatron_espo.types import Trajectory


class Scorer:
    """Scores trajectories.

    Args:
        config: the run's configuration.
        tokenizer: decodes the prompts that a judge reads.
        loop: runs the judge's requests. It must outlive :meth:`close`.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, loop: LoopThread) -> None:
        self._reward, self._tokenizer, self._loop = config.reward, tokenizer, loop
        self._weights, judge = config.reward.weights, config.judge
        functions = [name for name in self._weights if name not in judge.prompts]
        uses_judge = len(functions) < len(self._weights)
        self._judge = JudgeClient(judge, config.run.dir) if uses_judge else None
        self._pools = {name: RewardPool(config.reward, name) for name in functions}

    def start(self) -> None:
        """Load the reward functions, and send the judge one request.

        Raises:
            InputError: a function cannot be loaded, or the judge does not answer.
        """
        for pool in self._pools.values():
            pool.start()
        if self._judge:
            self._loop.run(self._judge.start())

    def submit(self, found: Trajectory) -> Future[Trajectory]:
        """Score a trajectory in the background, unless its environment has scored it.

        Returns:
            The trajectory with its reward: NaN if a function or the judge failed. With several
            rewards, ``rewards`` has the score of each that did not fail, before its weight.
        """
        return self._loop.submit(self._score(found))

    def check_failures(self, failed: int, total: int, step: int, environment: str = "") -> None:
        """InputError where more than ``reward.max_failed`` of a step's responses have no score.

        Args:
            environment: the last failure of the environment.
        """
        limit = self._reward.max_failed
        if failed > limit * total:
            sources = self._pools | ({"the judge": self._judge} if self._judge else {})
            failures = {name: s.last_failure for name, s in sources.items()}
            failures["the environment"] = environment
            causes = [f"{name}: {failure}" for name, failure in failures.items() if failure]
            raise InputError(
                f"reward: expected a score for each response, but {failed} of {total} of step "
                f"{step} failed, more than reward.max_failed = {limit:g}; the last failure of "
                f"{'; of '.join(causes) or 'an environment'}"
            )

    def pop_metrics(self) -> dict[str, float]:
        """Return the ``judge/*`` metrics since the last call."""
        return self._loop.run(self._judge.pop_metrics()) if self._judge else {}

    def close(self) -> None:
        """Kill the workers and close the judge's connections."""
        for pool in self._pools.values():
            pool.close()
        if self._judge:
            self._loop.run(self._judge.close(), 5.0)

    async def _score(self, found: Trajectory) -> Trajectory:
        if found.reward is not None:
            return found
        scores = await asyncio.gather(*(self._term(name, found) for name in self._weights))
        pairs = zip(self._weights, scores, strict=True)
        known = {name: score for name, score in pairs if score is not None}
        total = None
        if len(known) == len(scores):
            total = sum(self._weights[name] * score for name, score in known.items())
        if len(scores) > 1:
            parts = {f"reward/mean_{name.rpartition(':')[2]}": known[name] for name in known}
            found = replace(found, rewards=found.rewards | parts)
        return found.with_reward(total)

    async def _term(self, name: str, found: Trajectory) -> float | None:
        if pool := self._pools.get(name):
            return await asyncio.wrap_future(pool.submit(found.prompt, found.text))
        assert self._judge
        # Without the special tokens of the chat template, which the judge's server would read.
        text = self._tokenizer.decode(found.prompt.token_ids)
        return await self._judge.score(name, replace(found.prompt, text=text), found.text)
