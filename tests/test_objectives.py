"""Loss and gradient of every objective against plain Python floats."""

import math
import random
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.vespo import VESPO
from megatron_espo.algo import (
    CEGPPO,
    CISPO,
    DAPO,
    DPPO,
    ESPO,
    GMPO,
    GRPO,
    GSPO,
    SAPO,
    DrGRPO,
    LossInputs,
    Objective,
    group_advantages,
    load_objective,
    padded_loss,
)
from megatron_espo.algo.objectives import OBJECTIVES, would_clip
from megatron_espo.config import Algorithm, schema
from megatron_espo.errors import InputError
from tests.support.objective_reference import Response, Rules, expected, exponential

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
    "ce_gppo": (0.2, 0.28),
    "dppo": (0.2, 0.2),
    "sapo": (math.inf, math.inf),
}
QUANTILES = st.sampled_from([(0.8,), (0.5,), (0.3, 0.8), (0.25, 0.5, 0.75)])
CASES = [
    *({"objective": name} for name in BOUNDS),
    {"objective": "espo", "ratio": "segment_times_token"},
    {"objective": "espo", "clip_floor": 5e-3, "alpha": 0.1},
    {"objective": "gspo", "ratio": "segment_times_token"},
    {"objective": "espo", "dual_clip": 3.0},
    {"objective": "grpo", "dual_clip": 1.5},
    {"objective": "ce_gppo", "objective_args": {"beta_low": 0.5, "beta_high": 0.25}},
    {"objective": "dppo", "objective_args": {"max_ratio": 3.0}},
    {"objective": "sapo", "objective_args": {"tau_pos": 0.7, "tau_neg": 2.0}},
]
VESPO_NAME = "examples.vespo:VESPO"


def single(value: float) -> float:
    """Round to float32, so that both precisions get the same numbers."""
    return float(torch.tensor(value))


@st.composite
def batches(draw) -> list[Response]:
    """Responses of 1 to 12 tokens with ties, zero advantages and log-ratios of 1e-4 to 50."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([2e-4, 2e-3, 0.3, 1.5, 50.0]))
    levels = [single(rng.uniform(0, math.log(VOCAB))) for _ in range(draw(st.integers(1, 12)))]
    responses = []
    for length in draw(st.lists(st.integers(1, 12), min_size=1, max_size=5)):
        if spread == 1.5:  # probabilities that change by more than DPPO's limit
            new, old = ([single(-rng.uniform(0, 1.5)) for _ in range(length)] for _ in range(2))
        else:
            new = [single(-60 - rng.uniform(0, 5)) for _ in range(length)]
            old = [single(p - rng.uniform(-spread, spread)) for p in new]
        responses.append(
            Response(
                logprob=new,
                old_logprob=old,
                entropy=[rng.choice(levels) for _ in new],
                advantage=rng.choice(
                    [0.0, single(rng.uniform(0.1, 2)), single(rng.uniform(-2, -0.1))]
                ),
            )
        )
    return responses


def run(responses: list[Response], objective: Objective, dtype: torch.dtype, **totals):
    """``(gradient [tokens], LossInputs, LossOutput)`` of the package."""

    def flat(name: str) -> torch.Tensor:
        return torch.tensor([value for r in responses for value in getattr(r, name)], dtype=dtype)

    logprob = flat("logprob").requires_grad_()
    lengths = torch.tensor([len(r.logprob) for r in responses])
    advantage = torch.tensor([r.advantage for r in responses], dtype=dtype)
    segments = objective.segment_tokens(flat("entropy"), lengths, vocab_size=VOCAB, **totals)
    advantages = advantage.repeat_interleave(lengths)
    inputs = LossInputs(logprob, flat("old_logprob"), advantages, segments)
    output = objective.loss(inputs)
    (gradient,) = torch.autograd.grad(output.loss, logprob)
    return gradient, inputs, output


def totals_of(responses: list[Response]) -> dict[str, int]:
    """A step's whole batch, of which these responses are a part."""
    return {
        "num_responses": len(responses) + 3,
        "num_tokens": sum(len(r.logprob) for r in responses) + 17,
    }


def make_objective(objective: str, **settings) -> Objective:
    algorithm = Algorithm(
        objective=objective, advantage="dr_grpo" if objective == "dr_grpo" else "grpo", **settings
    )
    return load_objective(algorithm, max_response_tokens=MAX_TOKENS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
@QUICK
@given(responses=batches(), quantiles=QUANTILES)
def test_loss_and_gradient_equal_reference(case, dtype, responses, quantiles):
    low, high = BOUNDS[case["objective"]]
    rules = Rules(**case, low=low, high=high, quantiles=quantiles)
    wanted = expected(responses, rules, **totals_of(responses), max_tokens=MAX_TOKENS, vocab=VOCAB)
    gradient, _, result = run(
        responses, make_objective(**case, quantiles=quantiles), dtype, **totals_of(responses)
    )

    rtol, border = (1e-9, 1e-9) if dtype is torch.float64 else (1e-4, 3e-6)
    clear = torch.tensor(wanted.margin) > border
    assert result.loss.item() == pytest.approx(
        wanted.loss, rel=rtol, abs=rtol * sum(map(abs, wanted.gradient)) + 1e-9
    )
    torch.testing.assert_close(
        gradient[clear], torch.tensor(wanted.gradient, dtype=dtype)[clear], rtol=rtol, atol=1e-9
    )
    torch.testing.assert_close(
        result.ratio, torch.tensor(wanted.ratio, dtype=dtype), rtol=rtol, atol=1e-12
    )
    assert torch.equal(
        result.no_gradient[clear], torch.tensor([g == 0 for g in wanted.gradient])[clear]
    )


@pytest.mark.parametrize("objective", BOUNDS)
@QUICK
@given(responses=batches())
def test_clipped_shares_equal_reference(objective, responses):
    low, high = BOUNDS[objective]
    wanted = expected(
        responses,
        Rules(objective, low, high),
        **totals_of(responses),
        max_tokens=MAX_TOKENS,
        vocab=VOCAB,
    )
    instance = make_objective(objective)
    _, inputs, output = run(responses, instance, torch.float64, **totals_of(responses))
    ratio = wanted.ratio
    if objective in ("gmpo", "dppo"):
        change = {"gmpo": lambda x: x, "dppo": math.exp}[objective]
        ratio = [
            1 + change(new) - change(old)
            for r in responses
            for new, old in zip(r.logprob, r.old_logprob, strict=True)
        ]
    low_side, high_side = instance.clipped(inputs, output)
    found = zip(low_side.tolist(), high_side.tolist(), strict=True)
    for t, (is_low, is_high) in enumerate(found):
        if objective == "cispo" or wanted.margin[t] > 1e-9:
            assert (is_low, is_high) == (
                ratio[t] < 1 - wanted.low[t],
                ratio[t] > 1 + wanted.high[t],
            ), t


@QUICK
@given(responses=batches(), objective=st.sampled_from(sorted(BOUNDS)))
def test_would_clip_equals_what_grpo_and_gspo_clip(responses, objective):
    def inputs_and_clipped(name):
        instance = make_objective(name)
        _, inputs, output = run(responses, instance, torch.float64, **totals_of(responses))
        return inputs, torch.stack(instance.clipped(inputs, output)).any(0)

    inputs, _ = inputs_and_clipped(objective)
    for name, clipped in would_clip(inputs).items():
        assert torch.equal(clipped, inputs_and_clipped(name)[1]), name


@pytest.mark.parametrize(
    ("objective", "dual_clip"), [*((name, None) for name in BOUNDS), ("espo", 3.0), ("dapo", 3.0)]
)
def test_unchanged_policy_has_the_plain_policy_gradient(objective, dual_clip):
    """Ratio 1 is inside every bound, even ESPO's at entropy 0: the gradient is ``-w A``."""
    logprob = [-1.0, -2.0, -0.0, -3.0, -1e-3]
    instance = make_objective(objective, dual_clip=dual_clip)
    for entropy in ([0.0] * 5, [0.0, 1.0, 2.0, 0.5, 0.5]):
        responses = [Response(logprob, logprob, entropy, advantage) for advantage in (1.5, -0.5)]
        gradient, inputs, output = run(
            responses, instance, torch.float32, num_responses=2, num_tokens=10
        )
        low, high = BOUNDS[objective]
        wanted = expected(
            responses,
            Rules(objective, low, high),
            num_responses=2,
            num_tokens=10,
            max_tokens=MAX_TOKENS,
            vocab=VOCAB,
        )
        advantages = [1.5] * 5 + [-0.5] * 5
        plain = torch.tensor([-w * a for w, a in zip(wanted.weight, advantages, strict=True)])
        torch.testing.assert_close(gradient, plain)
        low_side, high_side = instance.clipped(inputs, output)
        assert not (low_side | high_side | output.no_gradient).any()


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_extreme_log_ratios_stay_finite(case, advantage):
    responses = [
        Response(
            [-60.0] * 4, [-60.0 - d, -60.0, -60.0 + d, -60.0 - d], [0.0, 1.0, 2.0, 4.0], advantage
        )
        for d in (50, -50)
    ] + [Response([-60.0 + d], [-60.0], [0.0], advantage) for d in (50, -50)]
    gradient, _, result = run(
        responses, make_objective(**case), torch.float32, **totals_of(responses)
    )
    assert result.loss.isfinite() and gradient.isfinite().all() and result.ratio.isfinite().all()


def test_almost_open_gate_of_sapo_keeps_its_gradient_in_float32():
    responses = [Response([-1.0], [-1.0 - d], [0.0], 1.0) for d in (2.0, 2.5, 2.75)]
    found, wanted = (
        run(responses, make_objective("sapo"), dtype, **totals_of(responses))[0].double()
        for dtype in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("objective", BOUNDS)
def test_group_of_equal_rewards_has_no_gradient(objective):
    advantages = group_advantages(torch.full((1, 8), 100.1))[0].tolist()
    responses = [Response([-1.0, -2.0], [-1.1, -2.5], [1.0, 0.1], a) for a in advantages]
    gradient, _, result = run(
        responses, make_objective(objective), torch.float32, **totals_of(responses)
    )
    assert result.loss == 0 and not gradient.any() and result.no_gradient.all()


@pytest.mark.parametrize("value", [math.nan, 0.1, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["logprob", "old_logprob"])
def test_impossible_log_prob_is_refused(value, which):
    values = {"logprob": [-1.0, -1.0], "old_logprob": [-1.0, -1.0]} | {which: [-1.0, value]}
    responses = [Response(**values, entropy=[0.5, 0.5], advantage=1.0)]
    with pytest.raises(ValueError, match=rf"^{which}: expected log-probabilities.*at token 1"):
        run(responses, make_objective("espo"), torch.float32, num_responses=1, num_tokens=2)


def inputs_of(objective: Objective, **change) -> LossInputs:
    """Four tokens of two responses."""
    totals = {"vocab_size": VOCAB, "num_responses": 2, "num_tokens": 4}
    values = {
        "logprob": torch.tensor([-1.0, -2.0, -0.5, -1.5]),
        "old_logprob": torch.tensor([-1.25, -1.5, -0.75, -1.0]),
        "advantage": torch.tensor([1.0, 1.0, -2.0, -2.0]),
        "entropy": torch.tensor([0.5, 1.0, 1.5, 0.25]),
    }
    segments = objective.segment_tokens(values["entropy"], torch.tensor([2, 2]), **totals)
    return LossInputs(**values | {"segments": segments} | change)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_other_dtypes_are_computed_in_float32(objective):
    """bfloat16 log-probs and integer advantages; the numbers are exact in both types."""
    instance = make_objective(objective)
    wanted = instance.loss(plain := inputs_of(instance))
    narrow = {
        name: getattr(plain, name).bfloat16() for name in ("logprob", "old_logprob", "entropy")
    }
    inputs = inputs_of(instance, **narrow, advantage=plain.advantage.long())
    assert inputs.entropy.dtype == torch.float32
    found = instance.loss(inputs)
    assert found.loss.dtype == found.ratio.dtype == torch.float32
    assert torch.equal(found.loss, wanted.loss) and torch.equal(found.ratio, wanted.ratio)


@pytest.mark.parametrize("name", ["logprob", "old_logprob", "advantage", "entropy"])
@pytest.mark.parametrize(
    "value",
    [torch.zeros(4, 1), torch.zeros(1), torch.zeros(3), torch.zeros(4, device="meta")],
    ids=["column", "one", "short", "device"],
)
def test_tensor_of_another_shape_or_device_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected shape \[4\] on cpu, got"):
        inputs_of(make_objective("espo"), **{name: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_advantage_that_is_not_finite_is_refused(value):
    advantage = torch.tensor([1.0, 0.0, value, 1.0])
    with pytest.raises(ValueError, match="^advantage: expected finite numbers, got .* at token 2"):
        inputs_of(make_objective("espo"), advantage=advantage)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (ESPO, {"alpha": -0.1}),
        (ESPO, {"clip_floor": math.nan}),
        (ESPO, {"dual_clip": 0.5}),
        (ESPO, {"ratio": "token"}),
        (GSPO, {"clip_low": -1e-4}),
        (DAPO, {"clip_high": math.inf}),
        (CISPO, {"clip_low": -0.1}),
        (GMPO, {"clip_high": -0.1}),
        (CEGPPO, {"clip_high": math.nan}),
        (CEGPPO, {"beta_low": -0.1}),
        (DPPO, {"clip_low": -0.1}),
        (DPPO, {"max_ratio": 0.5}),
        (SAPO, {"tau_neg": 0.0}),
        (DrGRPO, {"max_response_tokens": 0}),
    ],
)
def test_setting_out_of_range_is_refused(cls, settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name}: expected .*, got"):
        cls(**settings)


def test_gmpo_has_a_limit_on_each_side():
    """Log-ratios 0.25 and -0.5: A > 0 takes the smaller, A < 0 the larger of plain and clipped."""
    instance = GMPO(clip_low=0.1, clip_high=0.4)
    output = instance.loss(inputs_of(instance))
    torch.testing.assert_close(output.ratio.log(), torch.tensor([-0.125, -0.125, 0.075, 0.075]))
    assert output.no_gradient.tolist() == [False, False, False, True]


@pytest.mark.parametrize("name", ["segmentation", "aggregation"])
def test_unknown_name_in_a_class_is_refused(name):
    with pytest.raises(
        ValueError, match=f"{name}: expected one of .*response, token, got 'prompt'"
    ):
        type("Mine", (GRPO,), {name: "prompt"})()


PADDED = {
    "logprob": torch.full((2, 3), -1.0),
    "old_logprob": torch.full((2, 3), -1.5),
    "entropy": torch.full((2, 3), 0.5),
    "advantage": torch.tensor([1.0, -2.0]),
    "mask": torch.tensor([[1, 1, 0], [1, 0, 0]]),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": torch.full((2, 3), 0.5)}, "mask: expected 0 and 1"),
        ({"mask": torch.full((2, 3), math.nan)}, "mask: expected 0 and 1"),
        ({"mask": torch.ones(2)}, "mask: expected 0 and 1"),
        ({"mask": torch.ones(2, 3, 1)}, "mask: expected 0 and 1"),
        ({"advantage": torch.ones(1)}, "advantage: expected shape"),
        ({"advantage": torch.ones(3)}, "advantage: expected shape"),
        ({"advantage": torch.tensor([1.0, math.nan])}, "advantage: expected finite"),
        ({"logprob": torch.ones(2)}, "logprob: expected shape"),
        ({"old_logprob": torch.ones(2, 1)}, "old_logprob: expected shape"),
        ({"entropy": torch.ones(6)}, "entropy: expected shape"),
        ({"correction": torch.ones(2, 2)}, "correction: expected shape"),
        ({"correction": torch.tensor([1.0, math.inf])}, "correction: expected finite"),
    ],
)
def test_wrong_argument_of_padded_loss_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        padded_loss(ESPO(), **PADDED | change, vocab_size=VOCAB)


def test_padded_loss_takes_equivalent_arguments():
    """Advantages by response or by token, masks of any dtype, and rows without trained tokens."""

    def loss(**change):
        return padded_loss(ESPO(), **PADDED | change, vocab_size=VOCAB).loss

    wanted, rows = loss(), PADDED["advantage"]
    for advantage in (rows[:, None], rows[:, None].expand(2, 3), rows.long()):
        assert torch.equal(loss(advantage=advantage), wanted)
    for dtype in (torch.bool, torch.float32, torch.bfloat16):
        assert torch.equal(loss(mask=PADDED["mask"].to(dtype)), wanted)
    assert loss(**{name: values[:0] for name, values in PADDED.items()}) == 0
    # A row without trained tokens counts as a response, and its values are not read.
    longer = {
        name: torch.cat([v, torch.full_like(v[:1], 0 if name == "mask" else math.nan)])
        for name, v in PADDED.items()
    }
    assert torch.equal(loss(**longer), loss(num_responses=3))


@pytest.mark.parametrize("objective", [*OBJECTIVES, VESPO_NAME])
def test_context_parallel_slices_add_up(objective):
    """Slices of responses on two ranks give the loss and gradient of one rank."""
    torch.manual_seed(5)
    lengths, everything = torch.tensor([6, 9]), torch.arange(15)
    logprob, old = -torch.rand(2, 15, dtype=torch.float64) - 1
    advantage = torch.tensor([1.0, -1.0]).repeat_interleave(lengths).double()
    instance = make_objective(objective)
    segments = instance.segment_tokens(
        torch.rand(15).double(), lengths, vocab_size=VOCAB, num_responses=2, num_tokens=15
    )

    def slice_loss(tokens: torch.Tensor, sum_over_ranks):
        inputs = LossInputs(
            logprob[tokens].requires_grad_(),
            old[tokens],
            advantage[tokens],
            segments.select(tokens),
            sum_over_ranks=sum_over_ranks,
        )
        loss = instance.loss(inputs).loss
        return loss, torch.autograd.grad(loss, inputs.logprob)[0], would_clip(inputs)

    whole_loss, whole_gradient, whole_clip = slice_loss(everything, lambda sums: sums)
    ranks = [torch.tensor([0, 1, 5, 6, 9, 14]), torch.tensor([2, 3, 4, 7, 8, 10, 11, 12, 13])]
    seen: list[list[torch.Tensor]] = [[], []]
    for tokens, mine in zip(ranks, seen, strict=True):
        slice_loss(tokens, lambda sums, mine=mine: mine.append(sums) or sums)
    # An all-reduce needs the same calls in the same order on each rank.
    assert len(seen[0]) == len(seen[1])
    total = 0.0
    for tokens in ranks:
        added = iter([a + b for a, b in zip(*seen, strict=True)])
        loss, gradient, clip = slice_loss(tokens, lambda _, added=added: next(added))
        total += loss
        torch.testing.assert_close(gradient, whole_gradient[tokens])
        assert all(torch.equal(clip[name], whole_clip[name][tokens]) for name in whole_clip)
    torch.testing.assert_close(total, whole_loss)


def test_configuration_keys_are_the_settings_of_the_classes():
    """Every objective is tested here, and ``schema.USED_BY`` knows the settings of its class."""
    assert set(BOUNDS) == set(OBJECTIVES) == set(schema.OBJECTIVES)
    for key, (neutral, users) in schema.USED_BY.items():
        classes = {name for name, cls in OBJECTIVES.items() if key in names_of(cls)}
        assert classes == set(users) and getattr(Algorithm(), key) == neutral, key
    keys = Algorithm.model_fields.keys() | {"max_response_tokens"}
    assert schema.WITH_ARGS == tuple(n for n, cls in OBJECTIVES.items() if names_of(cls) - keys)
    changed = Algorithm(objective="ce_gppo", objective_args={"beta_low": 0.5}, clip_high=0.3)
    assert (load_objective(changed).beta_low, load_objective(changed).clip_high) == (0.5, 0.3)


def names_of(cls: type[Objective]) -> set[str]:
    return {field.name for field in fields(cls)}


def test_dr_grpo_without_its_limit_is_refused():
    with pytest.raises(InputError, match="dr_grpo.*max_response_tokens"):
        load_objective(Algorithm(objective="dr_grpo", advantage="dr_grpo"))


@pytest.mark.parametrize("given_settings", [{}, {"k_pos": 1.5, "lambda_neg": 0.5}])
@QUICK
@given(responses=batches())
def test_vespo_equals_its_formula(given_settings, responses):
    algorithm = Algorithm(objective=VESPO_NAME, objective_args=given_settings)
    objective = load_objective(algorithm, max_response_tokens=MAX_TOKENS)
    totals = totals_of(responses)
    gradient, inputs, output = run(responses, objective, torch.float64, **totals)
    args = {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0} | given_settings
    loss, slopes = 0.0, []
    for response in responses:
        side = "pos" if response.advantage > 0 else "neg"
        k, scale = args[f"k_{side}"], args[f"lambda_{side}"]
        ratio = exponential(sum(response.logprob) - sum(response.old_logprob))
        factor = ratio**k * math.exp(scale * (1 - ratio)) * response.advantage
        for logprob in response.logprob:
            slopes.append(-factor / totals["num_tokens"])
            loss += slopes[-1] * logprob
    assert output.loss.item() == pytest.approx(loss, rel=1e-9, abs=1e-9)
    wanted = torch.tensor(slopes, dtype=torch.float64)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-9)
    assert not torch.stack(objective.clipped(inputs, output)).any()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("no_such_module:VESPO", {}, "algorithm.objective: expected .*'no_such_module:VESPO'"),
        ("examples.vespo:VESP", {}, "algorithm.objective: expected .*'VESP'"),
        ("examples.vespo:torch", {}, "algorithm.objective: expected a subclass of Objective"),
        (VESPO_NAME, {"k": 1.0}, r"objective_args: .*\(k_neg, k_pos, .*\), got k$"),
        (VESPO_NAME, {"quantiles": (0.5,)}, r"objective_args: .*lambda_pos\), got quantiles"),
        ("sapo", {"tau": 1.0}, r"objective_args: .*\(tau_neg, tau_pos\), got tau"),
        ("ce_gppo", {"beta_low": "much"}, "objective_args: ce_gppo: "),
    ],
)
def test_wrong_objective_of_a_user_is_refused(name, arguments, message):
    with pytest.raises(InputError, match=message):
        load_objective(Algorithm(objective=name, objective_args=arguments))


def test_settings_that_an_objective_does_not_use_are_refused():
    with pytest.raises(ValueError, match="objective_args: expected none with objective espo"):
        Algorithm(objective_args={"tau_pos": 1.0})
    with pytest.raises(ValueError, match="clip_low: expected null"):
        Algorithm(objective="sapo", clip_low=0.1)
    with pytest.raises(ValueError, match="clip_low: expected null"):
        Algorithm(objective=VESPO_NAME, clip_low=0.1)
    objective = load_objective(Algorithm(objective=VESPO_NAME, quantiles=(0.5,)))
    assert objective == VESPO(quantiles=(0.5,))
