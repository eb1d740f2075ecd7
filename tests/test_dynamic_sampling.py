"""Prompts whose rewards are all equal give way to others, and every prompt is judged as it was sampled."""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from megatron_espo.batch import ScoredGroups
from megatron_espo.config import Algorithm, Reward, Rollout, Run
from megatron_espo.errors import InputError
from megatron_espo.ledger import Ledger
from megatron_espo.progress import Phases
from megatron_espo.rewards import RewardPool
from megatron_espo.sampling import Sampler
from megatron_espo.trainer import advantages_of, train_sequences
from megatron_espo.types import Prompt
from megatron_espo.types import Rollout as Sample

REWARDS = {0: [1.0, 1.0], 1: [0.0, 1.0], 2: [0.0, 0.0], 3: [0.0, 0.0], 4: [1.0, 0.0], 5: [0.0, 1.0], 6: [1.0, 0.0]}


def make_sample(number: int, length: int = 2) -> Sample:
    prompt = Prompt(str(number), f"p{number}", "", (1,))
    return Sample(prompt, (2,) * length, (-1.0,) * length, "length" if length > 3 else "stop", 0, f"{number}")


class FakeRewards(RewardPool):
    """A pool without workers, whose items are judged together when all of them are there."""

    def __init__(self, score):
        super().__init__(Reward())
        self.judge = score

    @contextmanager
    def scoring(self):
        items = {}
        yield SimpleNamespace(
            add=lambda number, prompt, text: items.setdefault(number, (prompt, text)),
            pump=lambda: 0,
            finish=lambda on_progress: self.judge([items[i] for i in range(len(items))], on_progress),
        )


def sampler(rounds: int, rewards=REWARDS) -> tuple[Sampler, list]:
    """A sampler over numbered prompts whose engine and verifier are these few lines."""
    calls, stream = [], iter(range(100))

    def generate(prompts, group_size, *, seed, on_progress):
        calls.append((seed, list(prompts)))
        return [[make_sample(p)] * group_size for p in prompts]

    def score(items, on_progress):
        numbers = [int(prompt.id) for prompt, _ in items]
        return [rewards[n][i % 2] for i, n in enumerate(numbers)]

    config = SimpleNamespace(
        rollout=Rollout(prompts_per_step=3, group_size=2, max_resampling_rounds=rounds), run=Run(steps=9, seed=1), reward=Reward()
    )
    prompts, pool = SimpleNamespace(take=lambda n: [next(stream) for _ in range(n)]), FakeRewards(score)
    pool.last_failure = "boom"
    return Sampler(config, prompts, SimpleNamespace(generate=generate), pool, lambda on_progress: on_progress), calls


@pytest.mark.parametrize(
    ("rounds", "kept", "asked"),
    [
        (0, ["0", "1", "2"], [[0, 1, 2]]),
        (1, ["4", "1", "2"], [[0, 1, 2], [3, 4]]),
        (5, ["4", "1", "5"], [[0, 1, 2], [3, 4], [5]]),
    ],
)
def test_equal_groups_are_replaced(rounds, kept, asked):
    made, calls = sampler(rounds)
    groups = made.batch(1, Phases(draw=False))
    assert [group[0].prompt.id for group in groups.rollouts] == kept
    assert groups.rewards.tolist() == [REWARDS[int(i)] for i in kept]
    assert [prompts for _, prompts in calls] == asked
    assert len({seed for seed, _ in calls}) == len(calls)
    ledger = Ledger()
    ledger.count(groups)
    dispatched = sum(map(len, asked))
    assert ledger == Ledger(dispatched, trained=3, dropped_equal=dispatched - 3)


def test_a_batch_in_which_every_verifier_failed_ends_the_run():
    made, _ = sampler(0, {n: [math.nan, math.nan] for n in range(3)})
    with pytest.raises(InputError, match="6 of 6 of step 1 failed.*the last one: boom"):
        made.batch(1, Phases(draw=False))


def test_truncated_responses_are_masked_and_penalized():
    groups = ScoredGroups([[make_sample(1, 2), make_sample(1, 4)]], torch.tensor([[1.0, 1.0]]), 1)
    config = SimpleNamespace(
        reward=Reward(overlong_buffer_tokens=2),
        rollout=Rollout(max_response_tokens=4, group_size=2),
        algorithm=Algorithm(),
    )
    advantages = advantages_of(groups, config)
    torch.testing.assert_close(advantages, torch.tensor([[1.0, -1.0]]) / math.sqrt(2))
    ((whole, cut),) = train_sequences(groups, advantages, mask_truncated=True)
    assert (whole.masked, cut.masked) == (False, True)
    ((_, cut),) = train_sequences(groups, advantages, mask_truncated=False)
    assert not cut.masked
