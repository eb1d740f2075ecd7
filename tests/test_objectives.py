"""Loss and gradient of every objective against plain Python floats."""

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_espo.algo import OBJECTIVES, annotate, group_advantages, policy_loss
from megatron_espo.config import Algorithm
from tests.objective_reference import Response, Rules, expected

QUICK = settings(max_examples=20, deadline=None, derandomize=True, database=None)
VOCAB, MAX_TOKENS = 131, 16
BOUNDS = {
    "espo": (None, None),
    "gspo": (3e-4, 4e-4),
    "grpo": (0.2, 0.2),
    "dr_grpo": (0.2, 0.2),
    "dapo": (0.2, 0.28),
    "cispo": (0.2, 0.2),
    "gmpo": (0.4, 0.4),
}
QUANTILES = st.sampled_from([(0.8,), (0.5,), (0.3, 0.8), (0.25, 0.5, 0.75)])
CASES = [
    *({"objective": name} for name in BOUNDS),
    {"objective": "espo", "ratio": "segment_times_token"},
    {"objective": "espo", "clip_floor": 5e-3, "alpha": 0.1},
    {"objective": "gspo", "ratio": "segment_times_token"},
    {"objective": "espo", "dual_clip": 3.0},
    {"objective": "grpo", "dual_clip": 1.5},
]


def single(value: float) -> float:
    """Rounded to float32, so that both precisions are given the same numbers."""
    return float(torch.tensor(value))


@st.composite
def batches(draw) -> list[Response]:
    """Responses from one token on, with tied entropies, zero advantages and log-ratios from 1e-4 to 50."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([2e-4, 2e-3, 0.3, 50.0]))
    levels = [single(rng.uniform(0, math.log(VOCAB))) for _ in range(draw(st.integers(1, 12)))]
    responses = []
    for length in draw(st.lists(st.integers(1, 12), min_size=1, max_size=5)):
        new = [single(-60 - rng.uniform(0, 5)) for _ in range(length)]
        responses.append(
            Response(
                logprob=new,
                old_logprob=[single(p - rng.uniform(-spread, spread)) for p in new],
                entropy=[rng.choice(levels) for _ in new],
                advantage=rng.choice([0.0, single(rng.uniform(0.1, 2)), single(rng.uniform(-2, -0.1))]),
            )
        )
    return responses


def run(responses: list[Response], algorithm, dtype: torch.dtype, **totals):
    """``(gradient [tokens], LossOutput)`` of the package."""

    def flat(name: str) -> torch.Tensor:
        return torch.tensor([value for r in responses for value in getattr(r, name)], dtype=dtype)

    logprob = flat("logprob").requires_grad_()
    lengths = torch.tensor([len(r.logprob) for r in responses])
    advantage = torch.tensor([r.advantage for r in responses], dtype=dtype).repeat_interleave(lengths)
    totals |= {"vocab_size": VOCAB, "max_response_tokens": MAX_TOKENS}
    annotation = annotate(flat("entropy"), lengths, algorithm, **totals)
    result = policy_loss(logprob, flat("old_logprob"), advantage, annotation, algorithm)
    (gradient,) = torch.autograd.grad(result.loss, logprob)
    return gradient, result


def totals_of(responses: list[Response]) -> dict[str, int]:
    """A step's whole batch, of which these responses are a part."""
    return {"num_responses": len(responses) + 3, "num_tokens": sum(len(r.logprob) for r in responses) + 17}


def make_algorithm(objective: str, **settings) -> Algorithm:
    return Algorithm(objective=objective, normalize_std=objective != "dr_grpo", **settings)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
@QUICK
@given(responses=batches(), quantiles=QUANTILES)
def test_loss_and_gradient_equal_reference(case, dtype, responses, quantiles):
    low, high = BOUNDS[case["objective"]]
    rules = Rules(**case, low=low, high=high, quantiles=quantiles)
    wanted = expected(responses, rules, **totals_of(responses), max_tokens=MAX_TOKENS, vocab=VOCAB)
    gradient, result = run(responses, make_algorithm(**case, quantiles=quantiles), dtype, **totals_of(responses))

    rtol, border = (1e-9, 1e-9) if dtype is torch.float64 else (1e-4, 3e-6)
    clear = torch.tensor(wanted.margin) > border
    assert result.loss.item() == pytest.approx(wanted.loss, rel=rtol, abs=rtol * sum(map(abs, wanted.gradient)) + 1e-9)
    torch.testing.assert_close(gradient[clear], torch.tensor(wanted.gradient, dtype=dtype)[clear], rtol=rtol, atol=1e-9)
    torch.testing.assert_close(result.ratio, torch.tensor(wanted.ratio, dtype=dtype), rtol=rtol, atol=1e-12)
    assert torch.equal(result.no_gradient[clear], torch.tensor([g == 0 for g in wanted.gradient])[clear])


@pytest.mark.parametrize("objective", BOUNDS)
@QUICK
@given(responses=batches())
def test_clipped_shares_equal_reference(objective, responses):
    low, high = BOUNDS[objective]
    wanted = expected(
        responses, Rules(objective, low, high), **totals_of(responses), max_tokens=MAX_TOKENS, vocab=VOCAB
    )
    _, result = run(responses, make_algorithm(objective), torch.float64, **totals_of(responses))
    ratio = wanted.ratio
    if objective == "gmpo":
        ratio = [1 + new - old for r in responses for new, old in zip(r.logprob, r.old_logprob, strict=True)]
    found = zip(result.clipped_low.tolist(), result.clipped_high.tolist(), strict=True)
    for t, (is_low, is_high) in enumerate(found):
        if objective == "cispo" or wanted.margin[t] > 1e-9:
            assert (is_low, is_high) == (ratio[t] < 1 - wanted.low[t], ratio[t] > 1 + wanted.high[t]), t


@QUICK
@given(responses=batches(), objective=st.sampled_from(sorted(BOUNDS)))
def test_what_grpo_and_gspo_would_clip_is_what_they_clip(responses, objective):
    _, result = run(responses, make_algorithm(objective), torch.float64, **totals_of(responses))
    for name in ("grpo", "gspo"):
        _, own = run(responses, make_algorithm(name), torch.float64, **totals_of(responses))
        assert torch.equal(result.would_clip[name], own.clipped_low | own.clipped_high), name


@pytest.mark.parametrize(("objective", "dual_clip"), [*((name, None) for name in BOUNDS), ("espo", 3.0), ("dapo", 3.0)])
def test_unchanged_policy_has_the_plain_policy_gradient(objective, dual_clip):
    """Ratio 1 lies inside every bound, also where entropy, and so ESPO's bound, is 0: the gradient is ``-w A``."""
    logprob = [-1.0, -2.0, -0.0, -3.0, -1e-3]
    for entropy in ([0.0] * 5, [0.0, 1.0, 2.0, 0.5, 0.5]):
        responses = [Response(logprob, logprob, entropy, advantage) for advantage in (1.5, -0.5)]
        gradient, result = run(
            responses, make_algorithm(objective, dual_clip=dual_clip), torch.float32, num_responses=2, num_tokens=10
        )
        low, high = BOUNDS[objective]
        wanted = expected(
            responses, Rules(objective, low, high), num_responses=2, num_tokens=10, max_tokens=MAX_TOKENS, vocab=VOCAB
        )
        advantages = [1.5] * 5 + [-0.5] * 5
        plain = torch.tensor([-w * a for w, a in zip(wanted.weight, advantages, strict=True)])
        torch.testing.assert_close(gradient, plain)
        assert not (result.clipped_low | result.clipped_high | result.no_gradient).any()


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_extreme_log_ratios_stay_finite(case, advantage):
    responses = [
        Response([-60.0] * 4, [-60.0 - d, -60.0, -60.0 + d, -60.0 - d], [0.0, 1.0, 2.0, 4.0], advantage)
        for d in (50, -50)
    ] + [Response([-60.0 + d], [-60.0], [0.0], advantage) for d in (50, -50)]
    gradient, result = run(responses, make_algorithm(**case), torch.float32, **totals_of(responses))
    assert result.loss.isfinite() and gradient.isfinite().all() and result.ratio.isfinite().all()


@pytest.mark.parametrize("objective", BOUNDS)
def test_group_of_equal_rewards_has_no_gradient(objective):
    advantages = group_advantages(torch.full((1, 8), 100.1))[0].tolist()
    responses = [Response([-1.0, -2.0], [-1.1, -2.5], [1.0, 0.1], a) for a in advantages]
    gradient, result = run(responses, make_algorithm(objective), torch.float32, **totals_of(responses))
    assert result.loss == 0 and not gradient.any() and result.no_gradient.all()


@pytest.mark.parametrize("value", [math.nan, 0.1, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["logprob", "old_logprob"])
def test_impossible_log_prob_is_refused(value, which):
    values = {"logprob": [-1.0, -1.0], "old_logprob": [-1.0, -1.0]} | {which: [-1.0, value]}
    responses = [Response(**values, entropy=[0.5, 0.5], advantage=1.0)]
    with pytest.raises(ValueError, match=rf"^{which}: expected log-probabilities.*at token 1"):
        run(responses, Algorithm(), torch.float32, num_responses=1, num_tokens=2)


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (torch.tensor([0, 0, 0]), "expected a segment for each of 4 tokens, got 3"),
        (torch.tensor([0, 0, 0, 7]), "do not cover the tokens"),
        (torch.tensor([0, 1, 1, 1]), "do not cover the tokens"),
    ],
)
def test_segments_that_do_not_cover_the_tokens_are_refused(segment, message):
    totals = {"vocab_size": VOCAB, "num_responses": 1, "num_tokens": 4, "max_response_tokens": MAX_TOKENS}
    annotation = annotate(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([4]), Algorithm(), **totals)
    values = -torch.ones(4)
    with pytest.raises(ValueError, match=message):
        policy_loss(values, values, values, replace(annotation, segment=segment), Algorithm())


def test_context_parallel_slices_add_up():
    """Slices of a response on two ranks, with the segments' sums added: the same loss and gradient as on one."""
    torch.manual_seed(5)
    lengths = torch.tensor([6, 9])
    logprob, old = -torch.rand(15, dtype=torch.float64) - 1, -torch.rand(15, dtype=torch.float64) - 1
    advantage, entropy = torch.tensor([1.0, -1.0]).repeat_interleave(lengths).double(), torch.rand(15).double()
    totals = {"vocab_size": VOCAB, "num_responses": 2, "num_tokens": 15, "max_response_tokens": MAX_TOKENS}
    ranks = [torch.tensor([0, 1, 5, 6, 9, 14]), torch.tensor([2, 3, 4, 7, 8, 10, 11, 12, 13])]
    for objective in OBJECTIVES:
        algorithm = make_algorithm(objective)
        whole = annotate(entropy, lengths, algorithm, **totals)

        def slice_loss(take: torch.Tensor, reduce, whole=whole, algorithm=algorithm):
            per_token = {n: v[take] for n, v in vars(whole).items() if n not in ("size", "length")}
            annotation = type(whole)(size=whole.size, length=whole.length, **per_token)
            leaf = logprob[take].requires_grad_()
            result = policy_loss(leaf, old[take], advantage[take], annotation, algorithm, reduce_segments=reduce)
            return result, torch.autograd.grad(result.loss, leaf)[0]

        everything, gradient = slice_loss(torch.arange(15), None)
        seen: list[list[torch.Tensor]] = []
        for take in ranks:
            seen.append([])
            slice_loss(take, lambda sums, mine=seen[-1]: mine.append(sums) or sums)
        # Each rank makes the same calls in the same order, as an all-reduce demands.
        assert len(seen[0]) == len(seen[1])
        parts = []
        for take in ranks:
            added = iter([a + b for a, b in zip(*seen, strict=True)])
            parts.append(slice_loss(take, lambda sums, added=added: next(added)))
        torch.testing.assert_close(sum(result.loss for result, _ in parts), everything.loss)
        for take, (result, part) in zip(ranks, parts, strict=True):
            torch.testing.assert_close(part, gradient[take])
            for name in ("grpo", "gspo"):
                assert torch.equal(result.would_clip[name], everything.would_clip[name][take])


def test_every_objective_is_tested():
    assert set(BOUNDS) == set(OBJECTIVES)
