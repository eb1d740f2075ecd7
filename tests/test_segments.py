"""Entropy groups, bounds and weights: exact counts, ties, other responses do not matter."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_espo.algo import ESPO, Objective, load_objective
from megatron_espo.algo.objectives import OBJECTIVES
from megatron_espo.algo.segments import entropy_groups, tokens_above
from megatron_espo.config import Algorithm
from tests.support.objective_reference import Response, Rules, expected, groups_of

QUICK = settings(max_examples=30, deadline=None, derandomize=True, database=None)
VOCAB = 131
TOTALS = {"vocab_size": VOCAB, "num_responses": 7, "num_tokens": 61}
# Few values, so that ties are common.
RESPONSES = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=12), min_size=1, max_size=5)


def make_objective(objective: str, **settings) -> Objective:
    algorithm = Algorithm(
        objective=objective, advantage="dr_grpo" if objective == "dr_grpo" else "grpo", **settings
    )
    return load_objective(algorithm, max_response_tokens=16)


def flatten(responses: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropies in steps of 0.5 nats ``[tokens]`` and lengths ``[responses]``."""
    return torch.tensor([0.5 * e for r in responses for e in r]), torch.tensor(
        [len(r) for r in responses]
    )


@pytest.mark.parametrize(
    ("quantile", "share"),
    [(0.8, Fraction(1, 5)), (0.3, Fraction(7, 10)), (1 / 3, 1 - Fraction("0.3333333333333333"))],
)
def test_tokens_above_a_boundary_are_counted_exactly(quantile, share):
    lengths = range(1, 16_385)
    found = tokens_above(quantile, torch.tensor(lengths)).tolist()
    assert found == [-(-share.numerator * n // share.denominator) for n in lengths]


@pytest.mark.parametrize("length", [1, 10, 30, 1_000, 16_384])
def test_group_sizes(length):
    entropy = torch.rand(length, generator=torch.Generator().manual_seed(length))
    sizes = (
        entropy_groups(entropy, torch.tensor([length]), (0.3, 0.8)).bincount(minlength=3).tolist()
    )
    top, upper = math.ceil(Fraction(1, 5) * length), math.ceil(Fraction(7, 10) * length)
    assert sizes == [length - upper, upper - top, top]


@QUICK
@given(RESPONSES, st.sampled_from([(0.8,), (0.5,), (0.3, 0.8), (0.25, 0.5, 0.75)]))
def test_groups_equal_reference(responses, quantiles):
    found = entropy_groups(*flatten(responses), quantiles)
    assert found.tolist() == [g for r in responses for g in groups_of(r, quantiles)]


def test_the_earlier_of_tied_tokens_joins_the_higher_group():
    entropy = torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0] + [3.0] * 10)
    assert (
        entropy_groups(entropy, torch.tensor([5, 10]), (0.6,)).tolist()
        == [1, 1, 0, 0, 0] + [1] * 4 + [0] * 6
    )


@QUICK
@given(RESPONSES, st.sampled_from(sorted(OBJECTIVES)), st.sampled_from([(0.8,), (0.3, 0.8)]))
def test_segments_do_not_depend_on_the_other_responses(responses, objective, quantiles):
    instance = make_objective(objective, quantiles=quantiles)
    whole = instance.segment_tokens(*flatten(responses), **TOTALS)
    parts = [instance.segment_tokens(*flatten([response]), **TOTALS) for response in responses]
    for name in ("low", "high", "weight", "group", "entropy", "length"):
        assert torch.equal(
            getattr(whole, name), torch.cat([getattr(part, name) for part in parts])
        ), name
    # Segments and responses are numbered across the whole, so a part's numbers are shifted.
    for name, size in (("segment", "size"), ("response", "length")):
        sizes = [getattr(part, size) for part in parts]
        assert torch.equal(getattr(whole, size), torch.cat(sizes)), name
        first = torch.tensor([0, *(s.numel() for s in sizes[:-1])]).cumsum(0)
        numbers = [getattr(part, name) + n for part, n in zip(parts, first, strict=True)]
        assert torch.equal(getattr(whole, name), torch.cat(numbers)), name


@QUICK
@given(RESPONSES, st.sampled_from(sorted(OBJECTIVES)), st.sampled_from([(0.8,), (0.3, 0.8)]))
def test_bounds_and_weights_equal_reference(responses, objective, quantiles):
    """Float32 and bfloat16 entropies: their sums are computed in float32."""
    low, high = {"espo": (None, None), "sapo": (math.inf, math.inf)}.get(objective, (0.15, 0.35))
    settings = {"quantiles": quantiles}
    if objective not in ("espo", "sapo"):
        settings |= {"clip_low": low, "clip_high": high}
    entropy, lengths = flatten(responses)
    values = (0.5 * torch.tensor([e for r in responses for e in r])).tolist()
    rows = [values[end - n : end] for end, n in zip(lengths.cumsum(0), lengths, strict=True)]
    wanted = expected(
        [Response([-1.0] * len(row), [-1.0] * len(row), row, 1.0) for row in rows],
        Rules(objective, low, high, quantiles),
        num_responses=7, num_tokens=61, max_tokens=16, vocab=VOCAB,
    )  # fmt: skip
    for given_entropy in (entropy, entropy.bfloat16()):  # steps of 0.5 are exact in both
        found = make_objective(objective, **settings).segment_tokens(
            given_entropy, lengths, **TOTALS
        )
        for name in ("low", "high", "weight"):
            values = getattr(found, name)
            assert values.dtype == torch.float32
            torch.testing.assert_close(values, torch.tensor(getattr(wanted, name)), msg=name)
        assert found.group.tolist() == wanted.group and torch.equal(found.entropy, entropy)
        assert torch.equal(found.response, torch.arange(len(rows)).repeat_interleave(lengths))
        assert torch.equal(found.size, found.segment.bincount())


def test_long_response_of_bfloat16_entropies():
    """A bfloat16 sum of 16,384 entropies would stop growing at 256."""
    entropy = torch.rand(16_384, generator=torch.Generator().manual_seed(1)).bfloat16()
    totals = {"vocab_size": VOCAB, "num_responses": 1, "num_tokens": 16_384}
    arguments = torch.tensor([16_384]), (0.8,)
    found = make_objective("espo").segment_tokens(entropy, arguments[0], **totals)
    exact, group = entropy.double(), entropy_groups(entropy, *arguments)
    for number in range(2):
        wanted = 0.02 / math.log(VOCAB) * exact[group == number].mean()
        torch.testing.assert_close(
            found.high[group == number].double().mean(), wanted, rtol=1e-5, atol=0
        )


def test_no_responses_give_empty_segments():
    for objective in OBJECTIVES:
        nothing = torch.zeros(0), torch.zeros(0, dtype=torch.long)
        segments = make_objective(objective).segment_tokens(*nothing, **TOTALS)
        assert all(value.numel() == 0 for value in vars(segments).values())


def test_clip_floor_is_the_smallest_clip_range():
    entropy, lengths = torch.tensor([0.0, 0.0, 0.0, 0.0, 3.0]), torch.tensor([5])
    segments = make_objective("espo", clip_floor=1e-3).segment_tokens(entropy, lengths, **TOTALS)
    expected = torch.tensor([1e-3] * 4 + [0.02 * 3 / math.log(VOCAB)])
    torch.testing.assert_close(segments.low, expected)
    torch.testing.assert_close(segments.high, expected)


@pytest.mark.parametrize("value", [-0.01, math.log(VOCAB) + 0.01, math.nan, math.inf, -math.inf])
def test_impossible_entropy_is_refused(value):
    entropy = torch.tensor([0.0, math.log(VOCAB), value])
    with pytest.raises(ValueError, match=r"entropy: expected values in \[0, ln 131.*at token 2"):
        make_objective("espo").segment_tokens(entropy, torch.tensor([3]), **TOTALS)


@pytest.mark.parametrize("lengths", [[2], [4], [3, 0], [4, -1], [], [[3]], [3.0]])
def test_lengths_that_do_not_cover_the_tokens_are_refused(lengths):
    lengths = torch.tensor(lengths) if lengths else torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match="lengths: expected"):
        make_objective("espo").segment_tokens(torch.ones(3), lengths, **TOTALS)
    with pytest.raises(ValueError, match="lengths: expected"):
        entropy_groups(torch.ones(3), lengths)


@pytest.mark.parametrize("name", TOTALS)
def test_totals_below_those_of_the_call_are_refused(name):
    least = {"vocab_size": 2, "num_responses": 1, "num_tokens": 3}
    arguments = torch.zeros(3), torch.tensor([3])
    make_objective("dapo").segment_tokens(*arguments, **least)
    with pytest.raises(ValueError, match=f"{name}: expected at least {least[name]}"):
        make_objective("dapo").segment_tokens(*arguments, **least | {name: least[name] - 1})


@pytest.mark.parametrize("quantiles", [(0.0,), (1.0,), (0.8, 0.3), (0.5, 0.5), (math.nan,)])
def test_quantiles_that_do_not_ascend_inside_0_and_1_are_refused(quantiles):
    with pytest.raises(ValueError, match="quantiles: expected ascending"):
        ESPO(quantiles=quantiles)
