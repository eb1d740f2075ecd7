"""A step's batch: prompts -> environments -> rewards. Rank 0 only."""

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_espo.batch import ScoredGroups
from megatron_espo.config import Config
from megatron_espo.data.prompts import PromptStream
from megatron_espo.lengths import LengthEstimates
from megatron_espo.progress import OnProgress, Phases
from megatron_espo.rewards.pool import RewardPool, Scoring
from megatron_espo.rollout.engine import Sampling
from megatron_espo.rollout.pool import request_seeds
from megatron_espo.rollout.runner import EnvironmentRunner
from megatron_espo.types import Prompt, Trajectory


@dataclass(eq=False)
class Group:
    """A prompt in flight with its trajectories.

    Attributes:
        start_step: step in which it was dispatched, with weights of version ``start_step - 1``.
        seeds: of its trajectories.
        futures: of its trajectories; empty: not started.
        trajectories: what finished, by position.
    """

    prompt: Prompt
    start_step: int
    seeds: list[int]
    futures: list[Future] = field(default_factory=list)
    trajectories: dict[int, Trajectory] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        return len(self.trajectories) == len(self.seeds)

    def state(self) -> dict[str, Any]:
        """JSON values from which :meth:`Sampler.load_state_dict` dispatches the prompt again."""
        return {"id": self.prompt.id, "start_step": self.start_step, "seeds": self.seeds}


@dataclass
class _Draft:
    """A step's incomplete batch. It survives a failed engine.

    Attributes:
        rounds: rounds of sampling that are over.
        dispatched: number of new prompts of each round that began.
        chosen: the batch so far; empty before the first round is over.
    """

    rounds: int = 0
    dispatched: list[int] = field(default_factory=list)
    chosen: list[Group] = field(default_factory=list)


class Sampler:
    """Keeps prompts in flight, and takes a batch of finished ones for each step.

    With ``rollout.max_staleness`` 0 a step samples its own prompts and waits for all of them. Otherwise
    ``rollout.over_sampling_prompts`` more are in flight; a step takes the first that finish, oldest first, and the others go on
    while the trainer trains and the engines take new weights. A prompt is trained at most ``max_staleness`` steps after the one
    in which it was dispatched, so no trained token is older.

    Args:
        config: the run's configuration.
        stream: of prompts.
        runner: of environments.
        rewards: the reward workers.
        eos_ids: token ids that end a turn.
        check: raises what ends the wait: a request to stop, or a failed engine.
    """

    def __init__(
        self,
        config: Config,
        stream: PromptStream,
        runner: EnvironmentRunner,
        rewards: RewardPool,
        eos_ids: frozenset[int],
        check: Callable[[], None],
    ) -> None:
        self._config, self._rollout, self._steps = config, config.rollout, config.run.steps
        self._stream, self._runner, self._rewards, self._check = stream, runner, rewards, check
        self._sampling = Sampling(
            max_tokens=config.rollout.max_response_tokens,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            stop_token_ids=tuple(sorted(eos_ids)),
        )
        self._lengths = LengthEstimates()
        self._pending: list[Group] = []
        self._news: queue.SimpleQueue = queue.SimpleQueue()
        self._slots = 0
        self._draft = _Draft()
        self._committed = self._state()

    def batch(self, step: int, phases: Phases) -> ScoredGroups:
        """The step's trajectories with their rewards. What it dispatched stays in flight when it raises.

        Raises:
            EngineError, Stopped: there is no batch yet; another call goes on where this one ended.
            InputError: too many trajectories could not be judged.
        """
        wanted, draft = self._rollout.prompts_per_step, self._draft
        self._start(self._pending, step)
        while draft.rounds <= self._rollout.max_resampling_rounds:
            places = [i for i in range(wanted) if not draft.rounds or not _varies(draft.chosen[i])]
            if not places:
                break
            if len(draft.dispatched) == draft.rounds:
                count = len(places) if draft.rounds else max(0, wanted + self._rollout.ahead - len(self._pending))
                self._dispatch(count, step, draft.rounds)
                draft.dispatched.append(count)
            found = self._take(len(places), step, phases)
            if draft.rounds:
                for place, group in zip(places, filter(_varies, found), strict=False):
                    draft.chosen[place] = group
            else:
                draft.chosen = found
            draft.rounds += 1
        chosen, dispatched = draft.chosen, sum(draft.dispatched)
        self._draft = _Draft()
        rollouts = [[group.trajectories[i] for i in range(len(group.seeds))] for group in chosen]
        rewards = torch.tensor([[sample.reward for sample in group] for group in rollouts], dtype=torch.float32)
        self._lengths.learn(rollouts)
        self._rewards.refuse_failures(int(rewards.isnan().sum()), rewards.numel(), step)
        self._committed = self._state()
        return ScoredGroups(rollouts, rewards, dispatched, len(self._pending))

    def state_dict(self) -> dict[str, Any]:
        """Prompt stream and prompts in flight after the last batch, as JSON values."""
        return self._committed

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`. Prompts that were in flight are dispatched again, with the same seeds."""
        for group in self._pending:
            _cancel(group)
        self._draft = _Draft()
        self._stream.load_state_dict(state["stream"])
        prompts = self._stream.find([entry["id"] for entry in state["pending"]])
        self._pending = [
            Group(prompt, entry["start_step"], entry["seeds"]) for prompt, entry in zip(prompts, state["pending"], strict=True)
        ]
        self._committed = self._state()

    def close(self) -> None:
        """Cancel what is in flight."""
        for group in self._pending:
            _cancel(group)

    def _state(self) -> dict[str, Any]:
        return {"stream": self._stream.state_dict(), "pending": [group.state() for group in self._pending]}

    def _dispatch(self, count: int, step: int, number: int) -> None:
        """Begin ``count`` new prompts in round ``number`` of a step."""
        prompts = self._stream.take(count)
        if self._rollout.longest_first:
            prompts = [prompts[i] for i in self._lengths.longest_first(prompts)]
        seed = self._config.run.seed * 1_000_003 + step + (number << 40)
        seeds = request_seeds(prompts, self._rollout.group_size, seed)
        new = [Group(prompt, step, own) for prompt, own in zip(prompts, seeds, strict=True)]
        self._start(new, step)
        self._pending += new

    def _start(self, groups: Sequence[Group], step: int) -> None:
        for group in groups:
            if group.futures:
                continue
            self._slots += 1
            for position, seed in enumerate(group.seeds):
                name = f"{step}.{self._slots}.{position}"
                future = self._runner.start(group.prompt, name, seed, self._sampling, slot=self._slots - 1)
                group.futures.append(future)
                future.add_done_callback(lambda done, group=group, position=position: self._news.put((group, position, done)))

    def _take(self, count: int, step: int, phases: Phases) -> list[Group]:
        """Wait for ``count`` finished prompts, with their rewards, and remove them from those in flight."""
        with self._rewards.scoring() as scoring:
            judged: list[tuple[Group, int]] = []
            for group in self._pending:
                for position in group.trajectories:
                    self._judge(group, position, scoring, judged)
            with phases.phase("rollout", step, self._steps) as on_progress:
                while (chosen := self._choose(count, step)) is None:
                    self._receive(scoring, judged)
                    scoring.pump()
                    self._progress(on_progress)
            with phases.phase("reward", step, self._steps) as on_progress:
                for number, score in enumerate(scoring.finish(self._polling(on_progress))):
                    group, position = judged[number]
                    group.trajectories[position] = group.trajectories[position].with_reward(score)
        self._pending = [group for group in self._pending if group not in chosen]
        return chosen

    def _receive(self, scoring: Scoring, judged: list[tuple[Group, int]]) -> None:
        """Take what finished, or wait a moment for it."""
        try:
            group, position, done = self._news.get(timeout=0.2)
            while True:
                if not done.cancelled():
                    group.trajectories[position] = done.result()
                    self._judge(group, position, scoring, judged)
                group, position, done = self._news.get_nowait()
        except queue.Empty:
            return

    @staticmethod
    def _judge(group: Group, position: int, scoring: Scoring, judged: list[tuple[Group, int]]) -> None:
        """Have a trajectory judged that has no reward yet."""
        found = group.trajectories[position]
        if found.reward is None:
            scoring.add(len(judged), found.prompt, found.text)
            judged.append((group, position))

    def _choose(self, count: int, step: int) -> list[Group] | None:
        """``count`` finished groups, oldest first; ``None``: too few have finished.

        Those that must not wait for a later step are among them: of all groups that must be trained by step ``d``, at most
        ``prompts_per_step`` for each step after this one may be left.
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

    def _progress(self, on_progress: OnProgress) -> None:
        self._check()
        done = sum(len(group.trajectories) for group in self._pending)
        on_progress(done, sum(len(group.seeds) for group in self._pending))

    def _polling(self, on_progress: OnProgress) -> OnProgress:
        def poll(finished: int, total: int) -> None:
            self._check()
            on_progress(finished, total)

        return poll


def _varies(group: Group) -> bool:
    """Whether rewards differ, so that the trajectories have an advantage."""
    rewards = [sample.reward for sample in group.trajectories.values() if sample.reward == sample.reward]
    return bool(rewards) and max(rewards) > min(rewards)


def _cancel(group: Group) -> None:
    for future in group.futures:
        future.cancel()
