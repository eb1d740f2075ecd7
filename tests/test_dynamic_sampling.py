"""Dynamic sampling of prompts with equal rewards; mask and penalty of truncated responses."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from megatron_espo.config import Algorithm, Reward, Rollout
from megatron_espo.data.scored_groups import ScoredGroups
from megatron_espo.errors import InputError
from megatron_espo.rollout.engine import EngineError
from megatron_espo.trainer.ledger import Ledger
from megatron_espo.trainer.train import advantages_of, train_sequences
from megatron_espo.types import Prompt, Trajectory
from tests.support.fake_engine import FakeRun, prompt_ids
from tests.support.trajectories import single_turn

# Rewards of the two responses to each prompt.
REWARDS = dict(enumerate([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0], *[[1.0, 0.0]] * 3]))
KEPT = [
    (0, [0, 1, 2], 3),
    (1, [4, 1, 2], 5),
    (5, [4, 1, 5], 6),
]


def make_run(rounds: int, rewards=REWARDS, check=None) -> FakeRun:
    """Return a run that gives the k-th response of a prompt the k-th reward."""
    judged = Counter()

    def judge(prompt: Prompt, text: str) -> float | None:
        judged[prompt.id] += 1
        return rewards[int(prompt.id)][judged[prompt.id] - 1]

    rollout = Rollout(
        prompts_per_step=3, group_size=2, max_resampling_rounds=rounds, max_response_tokens=4
    )
    return FakeRun(rollout, judge, check=check)


@pytest.mark.parametrize(("rounds", "kept", "dispatched"), KEPT)
def test_equal_groups_are_replaced(rounds, kept, dispatched):
    with make_run(rounds) as run:
        groups = run.batch(1)
    assert prompt_ids(groups) == kept
    found = [sorted(rewards) for rewards in groups.rewards.tolist()]
    assert found == [sorted(REWARDS[i]) for i in kept]
    responses = Counter(context[0] for context in run.source.requests)
    assert responses == dict.fromkeys(range(dispatched), 2)
    ledger = Ledger()
    ledger.count(groups)
    assert ledger == Ledger(dispatched, trained=3, dropped_equal=dispatched - 3)


@pytest.mark.parametrize(("rounds", "kept", "dispatched"), KEPT)
@pytest.mark.parametrize("fails", [1, 2, 4, 6])
def test_a_failed_engine_in_the_middle_of_a_batch_changes_nothing(rounds, kept, dispatched, fails):
    """The call after the failure keeps completed rounds and samples no response again."""
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == fails:
            raise EngineError("now")

    with make_run(rounds, check=check) as run:
        try:
            groups = run.batch(1)
        except EngineError:
            groups = run.batch(1)
        assert prompt_ids(groups) == kept and groups.dispatched == dispatched
        requests = Counter(context[0] for context in run.source.requests)
        assert requests == dict.fromkeys(range(dispatched), 2)
        assert len(run.rewards.judged) == 2 * dispatched
        assert run.state()["stream"] == {"position": dispatched}


def test_a_batch_in_which_every_verifier_failed_ends_the_run():
    with make_run(0, {n: [None, None] for n in range(3)}) as run:
        with pytest.raises(InputError, match="6 of 6 of step 1 failed.*: boom"):
            run.batch(1)


def test_a_batch_in_which_every_environment_failed_names_the_error():
    async def rollout(*_):
        raise RuntimeError("no tool")

    with make_run(0, {n: [None, None] for n in range(3)}) as run:
        run.runner.environment = SimpleNamespace(rollout=rollout)
        with pytest.raises(InputError, match="6 of 6 of step 1 failed.*prompt '.': .*no tool"):
            run.batch(1)


def make_sample(length: int) -> Trajectory:
    reason = "length" if length > 3 else "stop"
    return single_turn(Prompt("1", "p1", "", (1,)), (2,) * length, (-1.0,) * length, 0, reason, "1")


def test_truncated_responses_are_masked_and_penalized():
    groups = ScoredGroups([[make_sample(2), make_sample(4)]], torch.tensor([[1.0, 1.0]]), 1)
    config = SimpleNamespace(
        reward=Reward(overlong_buffer_tokens=2),
        rollout=Rollout(max_response_tokens=4, group_size=2),
        algorithm=Algorithm(),
    )
    advantages, _ = advantages_of(groups, config)
    torch.testing.assert_close(advantages, torch.tensor([[1.0, -1.0]]) / math.sqrt(2))
    ((whole, cut),) = train_sequences(groups, advantages, mask_truncated=True)
    assert (whole.masked, cut.masked) == (False, True)
    ((_, cut),) = train_sequences(groups, advantages, mask_truncated=False)
    assert not cut.masked


def test_equal_rewards_train_with_rl_zvp_if_it_is_on():
    rewards = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    groups = ScoredGroups([[make_sample(2), make_sample(3)] for _ in rewards], rewards, 1)
    for scale, wanted in ((0.0, [0, 0, 0, 0]), (0.25, [0.25, 0.25, -0.25, -0.25])):
        config = SimpleNamespace(
            reward=Reward(),
            rollout=Rollout(group_size=2),
            algorithm=Algorithm(zero_variance_scale=scale),
        )
        advantages, signs = advantages_of(groups, config)
        sequences = [s for g in train_sequences(groups, advantages, False, None, signs) for s in g]
        assert [s.advantage for s in sequences[:4]] == wanted
        assert [s.zero_variance for s in sequences] == [*(4 * w for w in wanted), 0, 0]
        assert sequences[4].advantage > 0 > sequences[5].advantage
