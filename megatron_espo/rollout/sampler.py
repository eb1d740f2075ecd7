"""Samples the batch of each step: prompts -> environments -> rewards. Rank 0 only."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from megatron_espo.config import Config
from megatron_espo.data.prompts import PromptStream
from megatron_espo.data.scored_groups import ScoredGroups
from megatron_espo.monitoring.progress import Phases
from megatron_espo.rewards.pool import wait_all
from megatron_espo.rollout.engine import Sampling
from megatron_espo.rollout.pool import request_seeds
from megatron_espo.rollout.runner import EnvironmentRunner
from megatron_espo.rollout.scorer import Scorer
from megatron_espo.types import Prompt, Trajectory


@dataclass(eq=False)
class Group:
    """A prompt in flight with its trajectories.

    Attributes:
        start_step: step in which it was dispatched, with weights of version ``start_step - 1``.
        seeds: of its trajectories.
        futures: of its trajectories; empty: not started.
        scores: of the finished trajectories, by position.
        samples: all trajectories with their rewards; empty: not chosen yet.
    """

    prompt: Prompt
    start_step: int
    seeds: list[int]
    futures: list[Future[Trajectory]] = field(default_factory=list)
    scores: dict[int, Future[Trajectory]] = field(default_factory=dict)
    samples: list[Trajectory] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        return len(self.scores) == len(self.seeds)

    def varies(self) -> bool:
        """Whether the rewards differ, so that the trajectories have an advantage."""
        return len({s.reward for s in self.samples if s.reward == s.reward}) > 1

    def cancel(self) -> None:
        for future in (*self.futures, *self.scores.values()):
            future.cancel()


class Sampler:
    """Keeps prompts in flight and returns a batch of finished prompts for each step.

    With ``rollout.max_staleness`` 0, a step samples its own prompts and waits for all of them.
    Otherwise ``rollout.over_sampling_prompts`` more are in flight. A step takes the first that
    finish, oldest first. The others continue while the trainer trains and the engines take new
    weights. A prompt is trained at most ``max_staleness`` steps after the step that dispatched it,
    so no trained token is older.

    Args:
        config: the run's configuration.
        stream: of prompts.
        runner: of environments.
        scorer: scores the trajectories.
        check: called while the sampler waits; raises on a stop request or a failed engine.
    """

    def __init__(
        self,
        config: Config,
        stream: PromptStream,
        runner: EnvironmentRunner,
        scorer: Scorer,
        check: Callable[[], None],
    ) -> None:
        rollout = config.rollout
        self._config, self._rollout, self._steps = config, rollout, config.run.steps
        self._stream, self._runner, self._scorer, self._check = stream, runner, scorer, check
        self._sampling = Sampling.of(rollout, runner.tokenizer.eos_ids)
        self._pending: list[Group] = []
        self._news = threading.Event()  # a trajectory has finished
        self._slots = 0
        self._begin_batch()
        self._committed = self._state()

    def _begin_batch(self) -> None:
        """Reset the incomplete batch, which is kept when an engine fails."""
        self._rounds = self._dispatched = 0  # completed rounds of sampling; new prompts
        self._chosen: list[Group] = []  # empty before the first round is completed

    def batch(self, step: int, phases: Phases) -> ScoredGroups:
        """Return the step's trajectories with their rewards.

        Raises:
            EngineError, Stopped: no batch yet. What was dispatched stays in flight, and the next
                call continues from there.
            InputError: scoring failed for too many trajectories.
        """
        wanted = self._rollout.prompts_per_step
        while self._rounds <= self._rollout.max_resampling_rounds:
            places = [i for i in range(wanted) if not self._rounds or not self._chosen[i].varies()]
            if not places:
                break
            in_flight = len(places) + self._rollout.ahead
            # Another run may have had more in flight: the rest would become too old.
            self._start(self._pending[:in_flight], step)
            # 0 after a failure: the prompts of the round are in flight.
            missing = max(0, in_flight - len(self._pending))
            self._dispatch(missing, step, self._rounds)
            self._dispatched += missing
            found = self._take(len(places), step, phases)
            if self._rounds:
                varied = [group for group in found if group.varies()]
                for place, group in zip(places, varied, strict=False):
                    self._chosen[place] = group
            else:
                self._chosen = found
            self._rounds += 1
        rollouts, dispatched = [group.samples for group in self._chosen], self._dispatched
        self._begin_batch()
        rewards = torch.tensor(
            [[sample.reward for sample in group] for group in rollouts], dtype=torch.float32
        )
        failed, last_failure = int(rewards.isnan().sum()), self._runner.last_failure
        self._scorer.check_failures(failed, rewards.numel(), step, last_failure)
        self._committed = self._state()
        counts = dispatched, len(self._pending), self._stream.skipped
        return ScoredGroups(rollouts, rewards, *counts, self._scorer.pop_metrics())

    def state_dict(self) -> dict[str, Any]:
        """Return the prompt stream and the prompts in flight after the last batch (JSON values)."""
        return self._committed

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`: dispatch its prompts again, with the same seeds."""
        self.close()
        self._begin_batch()
        self._stream.load_state_dict(state["stream"])
        prompts = self._stream.find([entry["id"] for entry in state["pending"]])
        self._pending = [
            Group(prompt, entry["start_step"], entry["seeds"])
            for prompt, entry in zip(prompts, state["pending"], strict=True)
        ]
        self._committed = self._state()

    def close(self) -> None:
        """Cancel what is in flight."""
        for group in self._pending:
            group.cancel()

    def _state(self) -> dict[str, Any]:
        pending = [
            {"id": group.prompt.id, "start_step": group.start_step, "seeds": group.seeds}
            for group in self._pending
        ]
        return {"stream": self._stream.state_dict(), "pending": pending}

    def _dispatch(self, count: int, step: int, number: int) -> None:
        """Start ``count`` new prompts in round ``number`` of a step."""
        prompts = self._stream.take(count)
        seed = self._config.run.seed * 1_000_003 + step + (number << 40)
        seeds = request_seeds(prompts, self._rollout.group_size, seed)
        new = [Group(prompt, step, own) for prompt, own in zip(prompts, seeds, strict=True)]
        self._start(new, step)
        self._pending += new

    def _start(self, groups: Sequence[Group], step: int) -> None:
        for group in groups:
            if group.futures:
                continue
            sampling = replace(self._sampling, slot=self._slots)
            self._slots += 1
            name = f"{step}.{self._slots}"
            group.futures = self._runner.start(group.prompt, name, sampling, group.seeds)
            for i, future in enumerate(group.futures):
                future.add_done_callback(partial(self._start_score, group, i))

    def _start_score(self, group: Group, i: int, done: Future[Trajectory]) -> None:
        """Score a finished trajectory. Called on the event loop."""
        if not done.cancelled():
            group.scores[i] = done if done.exception() else self._scorer.submit(done.result())
            self._news.set()

    def _take(self, count: int, step: int, phases: Phases) -> list[Group]:
        """Wait for ``count`` scored prompts and remove them from those in flight."""
        with phases.phase("rollout", step, self._steps, self._check) as on_progress:
            while (chosen := self._choose(count, step)) is None:
                self._news.wait(0.2)
                self._news.clear()
                done = sum(len(group.scores) for group in self._pending)
                on_progress(done, sum(len(group.seeds) for group in self._pending))
        with phases.phase("reward", step, self._steps, self._check) as on_progress:
            wait_all([score for group in chosen for score in group.scores.values()], on_progress)
        for group in chosen:
            group.samples = [group.scores[i].result() for i in range(len(group.seeds))]
            if all((sample.reward or 0.0) >= 1 for sample in group.samples):
                self._stream.note_solved(group.prompt)
        self._pending = [group for group in self._pending if group not in chosen]
        return chosen

    def _choose(self, count: int, step: int) -> list[Group] | None:
        """Return ``count`` finished groups, oldest first; ``None``: too few have finished.

        Groups that must not wait for a later step are among them. Of the groups that must be
        trained by step ``d``, at most ``prompts_per_step`` for each step up to ``d`` may be left.
        """
        finished = [group for group in self._pending if group.is_finished]
        if len(finished) < count:
            return None
        chosen = sorted(finished, key=lambda group: group.start_step)[:count]
        for ahead in range(self._rollout.max_staleness + 1):
            last_start = step + ahead - self._rollout.max_staleness
            due = [group for group in self._pending if group.start_step <= last_start]
            must = min(count, len(due) - self._rollout.prompts_per_step * ahead)
            if sum(group.start_step <= last_start for group in chosen) < must:
                return None
        return [group for group in self._pending if group in chosen]
