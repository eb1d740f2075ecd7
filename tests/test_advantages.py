"""Group-relative advantages against the standard library's statistics."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_espo.algo import group_advantages

QUICK = settings(max_examples=50, deadline=None, derandomize=True, database=None)
REWARD = st.one_of(st.just(math.nan), st.integers(0, 1).map(float), st.floats(-10, 10, width=32))


def reference(rewards: list[float], normalize_std: bool) -> list[float]:
    """One prompt: ``(R - mean) / std`` over its rewards."""
    ran = [r for r in rewards if not math.isnan(r)]
    if len(set(ran)) < 2:
        return [0.0] * len(rewards)
    mean = statistics.mean(ran)
    std = statistics.stdev(ran) if normalize_std else 1.0
    return [0.0 if math.isnan(r) else (r - mean) / std for r in rewards]


@QUICK
@given(st.lists(st.lists(REWARD, min_size=4, max_size=4), min_size=1, max_size=3), st.booleans())
def test_equals_statistics(rewards, normalize_std):
    found = group_advantages(torch.tensor(rewards), normalize_std=normalize_std)
    expected = torch.tensor([reference(row, normalize_std) for row in rewards])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_std_is_the_unbiased_one():
    # mean 0.25, sum of squares 0.75, three degrees of freedom
    found = group_advantages(torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    torch.testing.assert_close(found, torch.tensor([[-0.5, -0.5, -0.5, 1.5]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize_std", [True, False])
def test_equal_rewards_give_exactly_zero(normalize_std, dtype):
    # The floating-point mean of 100.1s is not always 100.1.
    for size in range(2, 20):
        rewards = torch.full((1, size), 100.1, dtype=dtype)
        assert not group_advantages(rewards, normalize_std=normalize_std).any()


def test_rewards_that_differ_by_little_still_differ():
    found = group_advantages(torch.tensor([[0.0, 1e-13]], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([[-1.0, 1.0]]) / math.sqrt(2))


def test_failed_verifiers_are_left_out():
    nan = math.nan
    found = group_advantages(
        torch.tensor([[1.0, nan, 0.0, nan], [nan, nan, nan, nan], [nan, 3.0, nan, nan]])
    )
    half = 0.5 / math.sqrt(0.5)
    torch.testing.assert_close(found, torch.tensor([[half, 0.0, -half, 0.0], [0.0] * 4, [0.0] * 4]))


@pytest.mark.parametrize("rewards", [torch.zeros(3, 1), torch.zeros(4), torch.zeros(2, 0)])
def test_group_of_one_is_refused(rewards):
    with pytest.raises(ValueError, match="group_size >= 2"):
        group_advantages(rewards)


def test_integers_and_lists_are_rewards_too():
    wanted = group_advantages(torch.tensor([[1.0, 0.0, 3.0]]))
    for rewards in (torch.tensor([[1, 0, 3]]), [[1, 0, 3]]):
        assert torch.equal(group_advantages(rewards), wanted)
    assert group_advantages(torch.zeros(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_reward_is_refused(value):
    with pytest.raises(ValueError, match="finite"):
        group_advantages(torch.tensor([[0.0, value]]))
