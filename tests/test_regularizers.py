"""Rollout correction, KL estimate and the overlong penalty against plain Python floats."""

import math
import random
from typing import get_args

import pytest
import torch

from megatron_espo.algo import (
    kl_estimate,
    load_objective,
    overlong_penalty,
    rollout_correction,
    rollout_mask,
)
from megatron_espo.algo.regularizers import CorrectionLevel
from megatron_espo.config import Algorithm

LENGTHS = [1, 4, 9]


def segments():
    totals = {"vocab_size": 131, "num_responses": 3, "num_tokens": 14}
    objective = load_objective(Algorithm())
    return objective.segment_tokens(torch.linspace(0, 4, 14), torch.tensor(LENGTHS), **totals)


def single(value: float) -> float:
    return round(value, 6)


def random_logprobs(seed: int, spread: float = 1.0) -> list[float]:
    draw = random.Random(seed)
    return [-draw.uniform(0, spread) for _ in range(14)]


def ratios(old: list[float], rollout: list[float], level: str) -> list[float]:
    """Trainer over engine, of each token, in plain floats."""
    found, start = [], 0
    for length in LENGTHS:
        exponents = [o - r for o, r in zip(old, rollout, strict=True)][start : start + length]
        if level != "token":
            total = sum(exponents) / (length if level == "geometric" else 1)
            exponents = [total] * length
        found += [math.exp(max(-20.0, min(20.0, x))) for x in exponents]
        start += length
    return found


@pytest.mark.parametrize("level", get_args(CorrectionLevel))
@pytest.mark.parametrize("spread", [1.0, 500.0])
def test_correction_is_the_limited_ratio(level, spread):
    old, rollout = random_logprobs(1, spread), random_logprobs(2, spread)
    floor, cap = (0.9, 1.2) if level == "geometric" and spread == 1.0 else (0.5, 2.0)
    found = rollout_correction(
        torch.tensor(old), torch.tensor(rollout), segments(), level=level, cap=cap, floor=floor
    )
    wanted = [min(max(r, floor), cap) for r in ratios(old, rollout, level)]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-4, atol=1e-9)
    assert {floor, cap} & set(map(single, found.tolist())) or level == "sequence"


@pytest.mark.parametrize(
    "limits",
    [
        {"token": [0.5, 1.5]},  # IcePop
        {"sequence": [0.8, 1.6]},
        {"geometric": [0.9, 1.1]},
        {"token": [0.5, 1.5], "geometric": [0.9, 1.1]},
    ],
)
def test_mask_keeps_ratios_inside_every_limit(limits):
    old, rollout = random_logprobs(1), random_logprobs(2)
    found = rollout_mask(torch.tensor(old), torch.tensor(rollout), segments(), limits)
    inside = [
        [low <= r <= high for r in ratios(old, rollout, level)]
        for level, (low, high) in limits.items()
    ]
    wanted = [all(token) for token in zip(*inside, strict=True)]
    assert found.tolist() == wanted and len(set(wanted)) == 2
    assert rollout_mask(torch.tensor(old), torch.tensor(rollout), segments(), {}).all()


def test_an_unknown_level_raises():
    levels = get_args(Algorithm.model_fields["rollout_correction"].annotation)
    assert levels == ("off", "metrics", *get_args(CorrectionLevel))
    with pytest.raises(ValueError, match=r"level: .*geometric.*got 'metrics'"):
        rollout_correction(torch.zeros(14), torch.zeros(14), segments(), level="metrics", cap=2.0)


@pytest.mark.parametrize("level", ["sequence", "geometric"])
def test_correction_of_responses_adds_up_over_slices(level):
    old, rollout = torch.tensor([random_logprobs(1), random_logprobs(2)])
    limits = {"token": [0.5, 1.5], level: [0.9, 1.1]}

    def correct(half, sum_over_ranks=lambda sums: sums):
        tokens = old[half], rollout[half], segments().select(half)
        weight = rollout_correction(*tokens, level=level, cap=2.0, sum_over_ranks=sum_over_ranks)
        return weight, rollout_mask(*tokens, limits, sum_over_ranks=sum_over_ranks)

    wanted = correct(torch.arange(14))
    halves = [torch.arange(0, 14, 2), torch.arange(1, 14, 2)]
    sums: list[torch.Tensor] = []
    for half in halves:
        correct(half, lambda part: sums.append(part) or part)
    for half in halves:
        weight, kept = correct(half, lambda _: sums[0] + sums[2])
        torch.testing.assert_close(weight, wanted[0][half])
        assert torch.equal(kept, wanted[1][half])


def test_wrong_arguments_are_refused():
    old, rollout = torch.tensor([random_logprobs(1), random_logprobs(2)])
    for change, message in (
        ({"level": "tokens"}, "level: expected one of token, sequence, geometric, got 'tokens'"),
        ({"old_logprob": old[:1]}, "old_logprob: expected shape"),
        ({"rollout_logprob": rollout[:, None]}, "rollout_logprob: expected shape"),
    ):
        arguments = {
            "old_logprob": old, "rollout_logprob": rollout, "segments": segments(),
            "level": "token", "cap": 2.0,
        }  # fmt: skip
        with pytest.raises(ValueError, match=message):
            rollout_correction(**arguments | change)
    with pytest.raises(ValueError, match="level: expected one of .*, got 'tokens'"):
        rollout_mask(old, rollout, segments(), {"tokens": [0.5, 2.0]})
    with pytest.raises(ValueError, match="reference_logprob: expected shape"):
        kl_estimate(old, rollout[:1])


def test_bfloat16_is_computed_in_float32():
    old, rollout = torch.tensor([random_logprobs(1), random_logprobs(2)]).bfloat16()
    for level in ("token", "sequence"):
        wanted, found = (
            rollout_correction(a, b, segments(), level=level, cap=2.0)
            for a, b in ((old.float(), rollout.float()), (old, rollout))
        )
        assert torch.equal(found, wanted)
    assert torch.equal(kl_estimate(old, rollout), kl_estimate(old.float(), rollout.float()))


def test_kl_estimate():
    new, reference = random_logprobs(3), random_logprobs(4)
    logprob = torch.tensor(new, requires_grad=True)
    found = kl_estimate(logprob, torch.tensor(reference))
    (gradient,) = torch.autograd.grad(found.sum(), logprob)
    for value, slope, p, q in zip(found.tolist(), gradient.tolist(), new, reference, strict=True):
        r = q - p
        assert (value, slope) == pytest.approx(
            (math.exp(r) - 1 - r, 1 - math.exp(r)), rel=1e-4, abs=1e-6
        )


def test_kl_of_impossible_tokens_stays_finite():
    logprob = torch.tensor([-500.0], requires_grad=True)
    value = kl_estimate(logprob, torch.tensor([-1.0]))
    assert value.isfinite().all() and torch.autograd.grad(value.sum(), logprob)[0].isfinite().all()


def test_kl_estimate_is_unbiased():
    """Exact expectation over a small vocabulary."""
    policy, reference = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.0, 0.0]]).log_softmax(1)
    exact = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * kl_estimate(policy, reference)).sum(), exact)


def test_overlong_penalty():
    lengths = torch.tensor([[1, 12], [14, 16]])
    found = overlong_penalty(lengths, max_tokens=16, buffer_tokens=4)
    assert found.tolist() == [[0.0, 0.0], [-0.5, -1.0]]
    # A response that is longer than the limit gets the whole penalty.
    found = overlong_penalty(torch.tensor([0, 8, 16, 20]), max_tokens=16, buffer_tokens=16)
    assert found.tolist() == [0.0, -0.5, -1.0, -1.0]
