"""One step's batch: prompts -> engines -> rewards. Rank 0 only."""

from collections.abc import Callable

import torch

from megatron_espo.batch import InFlight, ScoredGroups
from megatron_espo.config import Config
from megatron_espo.data.prompts import PromptStream
from megatron_espo.lengths import LengthEstimates
from megatron_espo.progress import OnProgress, Phases
from megatron_espo.rewards import RewardPool
from megatron_espo.rollout import Enough, Fleet
from megatron_espo.types import Prompt, Rollout


class Sampler:
    """Samples and judges.

    Args:
        config: the run's configuration.
        stream: of prompts.
        fleet: the engines.
        rewards: the reward workers.
        polling: makes of a progress callback one that may also raise, to give up.

    Attributes:
        in_flight: prompts that go on in the next step, those begun first in front. A batch that is given up changes nothing about them.
    """

    def __init__(
        self, config: Config, stream: PromptStream, fleet: Fleet, rewards: RewardPool, polling: Callable[[OnProgress], OnProgress]
    ) -> None:
        self._rollout, self._overlap = config.rollout, config.reward.overlap
        self._seed, self._steps = config.run.seed, config.run.steps
        self._stream, self._fleet, self._rewards, self._polling = stream, fleet, rewards, polling
        self._lengths = LengthEstimates()
        self.in_flight: list[InFlight] = []

    def batch(self, step: int, phases: Phases) -> ScoredGroups:
        """The step's rollouts with their rewards.

        Raises:
            EngineError, Stopped: there is none; the prompt stream has moved.
            InputError: too many responses could not be judged.
        """
        best = self._partial(step, phases) if self._rollout.extra_prompts else self._whole(step, phases)
        self._rewards.refuse_failures(int(best.rewards.isnan().sum()), best.rewards.numel(), step)
        return best

    def _whole(self, step: int, phases: Phases) -> ScoredGroups:
        """All responses to the next prompts; with dynamic sampling, groups of equal rewards give way to other prompts' that have some to learn from."""
        best = self._round(self._rollout.prompts_per_step, step, 0, phases)
        for number in range(1, self._rollout.max_resampling_rounds + 1):
            missing = int((~best.vary).sum())
            if not missing:
                break
            best = _replace_equal(best, self._round(missing, step, number, phases))
        return best

    def _round(self, count: int, step: int, number: int, phases: Phases) -> ScoredGroups:
        prompts = self._stream.take(count)
        order, group_size = self._order(prompts), self._rollout.group_size
        dealt = [prompts[i] for i in order]
        with self._rewards.scoring() as scoring:

            def judge(response: int, text: str) -> None:
                place, position = divmod(response, group_size)
                scoring.add(order[place] * group_size + position, dealt[place], text)

            def keep_judging(finished: int, total: int) -> None:
                scoring.pump()
                polled(finished, total)

            overlap = {"on_finished": judge} if self._overlap else {}
            with phases.phase("rollout", step, self._steps) as on_progress:
                polled = self._polling(on_progress)
                found = self._fleet.generate(dealt, group_size, seed=self._seed_of(step, number), on_progress=keep_judging, **overlap)
            groups = [group for _, group in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]
            return self._judged(groups, count, 0, scoring, step, phases)

    def _partial(self, step: int, phases: Phases) -> ScoredGroups:
        """As many prompts as a step has, out of more that are sampled: those whose responses are finished, the earliest first. The others go on in the next step."""
        wanted, group_size = self._rollout.prompts_per_step, self._rollout.group_size
        prompts = self._stream.take(wanted + self._rollout.extra_prompts - len(self.in_flight))
        ready = [entry for entry in self.in_flight if entry.is_finished]
        begun = [entry for entry in self.in_flight if not entry.is_finished]
        due = sum(step - entry.since >= self._rollout.max_carried_steps for entry in begun)  # they stand in front
        dealt = [entry.rollouts[0].prompt for entry in begun] + [prompts[i] for i in self._order(prompts)]
        with phases.phase("rollout", step, self._steps) as on_progress:
            found = self._fleet.generate(
                dealt,
                group_size,
                seed=self._seed_of(step, 0),
                on_progress=self._polling(on_progress),
                begun=[entry.rollouts for entry in begun],
                enough=Enough(wanted - len(ready), due),
            )
        since = [entry.since for entry in begun] + [step] * len(prompts)
        entries = sorted(ready + [InFlight(*pair) for pair in zip(since, found, strict=True)], key=lambda entry: entry.since)
        trained = [entry for entry in entries if entry.is_finished][:wanted]
        in_flight = [entry for entry in entries if entry not in trained]
        with self._rewards.scoring() as scoring:
            groups = self._judged([entry.rollouts for entry in trained], len(prompts), len(in_flight), scoring, step, phases)
        self.in_flight = in_flight
        return groups

    def _judged(self, groups: list[list[Rollout]], dispatched: int, in_flight: int, scoring, step: int, phases: Phases) -> ScoredGroups:
        """Finished groups with their rewards, those of ``scoring`` that were judged already among them."""
        self._lengths.learn(groups)
        with phases.phase("reward", step, self._steps) as on_progress:
            for number, sample in enumerate(sample for group in groups for sample in group):
                scoring.add(number, sample.prompt, sample.text)
            scores = scoring.finish(self._polling(on_progress))
        rewards = torch.tensor([float("nan") if score is None else score for score in scores])
        return ScoredGroups(groups, rewards.view(len(groups), self._rollout.group_size), dispatched, in_flight)

    def _order(self, prompts: list[Prompt]) -> list[int]:
        return self._lengths.longest_first(prompts) if self._rollout.longest_first else list(range(len(prompts)))

    def _seed_of(self, step: int, number: int) -> int:
        """One for each step and round: rerunning a run gives the same rollouts."""
        return self._seed * 1_000_003 + step + (number << 40)


def _replace_equal(groups: ScoredGroups, others: ScoredGroups) -> ScoredGroups:
    """Put those of ``others`` whose rewards vary in the place of groups whose rewards do not."""
    places, found = (~groups.vary).nonzero()[:, 0].tolist(), others.vary.nonzero()[:, 0].tolist()
    rollouts, rewards = list(groups.rollouts), groups.rewards.clone()
    for place, number in zip(places, found, strict=False):
        rollouts[place], rewards[place] = others.rollouts[number], others.rewards[number]
    return ScoredGroups(rollouts, rewards, groups.dispatched + others.dispatched)
