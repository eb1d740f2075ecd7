"""Group-relative advantages against the standard library's statistics."""

import math
import statistics
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_espo.algo import group_advantages, zero_variance_signs
from megatron_espo.algo.advantages import AdvantageName
from megatron_espo.config import Algorithm

QUICK = settings(max_examples=50, deadline=None, derandomize=True, database=None)
REWARD = st.one_of(st.just(math.nan), st.integers(0, 1).map(float), st.floats(-10, 10, width=32))


METHODS = get_args(AdvantageName)


def reference(rewards: list[float], method: str) -> list[float]:
    """Advantages of one prompt."""
    ran = [r for r in rewards if not math.isnan(r)]
    if len(set(ran)) < 2:
        return [0.0] * len(rewards)
    mean = statistics.mean(ran)
    if method == "rloo":  # the mean of the others
        others = {r: (sum(ran) - r) / (len(ran) - 1) for r in ran}
        return [0.0 if math.isnan(r) else r - others[r] for r in rewards]
    scale = {"grpo": statistics.stdev(ran), "dr_grpo": 1.0, "maxrl": mean}[method]
    return [0.0 if math.isnan(r) else (r - mean) / scale for r in rewards]


@QUICK
@given(
    st.lists(st.lists(REWARD, min_size=4, max_size=4), min_size=1, max_size=3),
    st.sampled_from(METHODS),
)
def test_equals_statistics(rewards, method):
    if method == "maxrl":
        rewards = [[abs(r) for r in row] for row in rewards]
    found = group_advantages(torch.tensor(rewards), method)
    expected = torch.tensor([reference(row, method) for row in rewards])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_std_is_the_unbiased_one():
    # mean 0.25, sum of squares 0.75, three degrees of freedom
    found = group_advantages(torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    torch.testing.assert_close(found, torch.tensor([[-0.5, -0.5, -0.5, 1.5]]))


def test_float64_rewards_are_compared_in_float64():
    rewards = torch.tensor([[2.0**24, 2.0**24 + 1]], dtype=torch.float64)
    assert group_advantages(rewards, "dr_grpo").tolist() == [[-0.5, 0.5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_equal_rewards_give_exactly_zero(method, dtype):
    # The floating-point mean of 100.1s is not always 100.1.
    for size in range(2, 20):
        rewards = torch.full((1, size), 100.1, dtype=dtype)
        assert not group_advantages(rewards, method).any()


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


def test_the_configuration_has_all_methods():
    assert get_args(Algorithm.model_fields["advantage"].annotation) == METHODS


def test_wrong_methods_and_rewards_raise():
    with pytest.raises(ValueError, match=r"method: .*maxrl.*got 'std'"):
        group_advantages(torch.tensor([[0.0, 1.0]]), "std")
    with pytest.raises(ValueError, match="at least 0 for maxrl, got -1"):
        group_advantages(torch.tensor([[-1.0, 1.0]]), "maxrl")


def test_signs_of_prompts_with_equal_rewards():
    rewards = [
        [1.0, 1.0, 1.0],
        [0.0, 0.0, 0.0],
        [0.5, 0.5, 0.5],
        [1.0, 0.0, 1.0],
        [1.0, math.nan, 1.0],
        [-1.0, -1.0, math.nan],
        [math.nan] * 3,
        [2.0, 1.0, 2.0],
    ]
    signs = [
        [1, 1, 1], [-1, -1, -1], [0, 0, 0], [0, 0, 0], [1, 0, 1], [-1, -1, 0], [0, 0, 0], [0, 0, 0]
    ]  # fmt: skip
    assert zero_variance_signs(torch.tensor(rewards)).tolist() == signs
    # Where RL-ZVP has a sign, the group's own advantage is 0.
    assert not (group_advantages(torch.tensor(rewards)) * torch.tensor(signs)).any()
