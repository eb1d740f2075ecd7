"""The loss function of the schedule against plain Python floats, on one rank and on two."""

import math
import threading
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_espo.algo import LossInputs, LossOutput, Objective, load_objective
from megatron_espo.config import Algorithm
from megatron_espo.data.packing import PackingSpec, TrainSequence, batch_totals, pack
from megatron_espo.megatron import loss as loss_module
from megatron_espo.megatron.forward_step import make_forward_step
from megatron_espo.megatron.loss import PolicyLoss
from tests.support.objective_reference import Response, Rules, expected
from tests.support.ranks.numerics import dense

VOCAB, CAP = 131, 1.5
TOTALS = {"num_responses": 9, "num_response_tokens": 77}
BOUNDS = {
    "espo": (None, None),
    "gspo": (3e-4, 4e-4),
    "grpo": (0.2, 0.2),
    "dapo": (0.2, 0.28),
    "cispo": (0.2, 0.2),
}


@dataclass
class Policy:
    """Log-probs and entropies of every token id, of the trained policy and the others."""

    logprob: torch.Tensor
    entropy: torch.Tensor
    old_logprob: torch.Tensor
    old_entropy: torch.Tensor
    rollout_logprob: torch.Tensor
    reference_logprob: torch.Tensor


def make_case() -> tuple[list[TrainSequence], Policy]:
    """Sequences with the token ids 1, 2, 3, ..., so that a token id determines its values."""
    draw, sequences, first = np.random.default_rng(3), [], 1
    count = 60
    logprob = -draw.uniform(1, 3, count)
    values = {
        "logprob": logprob,
        "entropy": draw.uniform(0, 4, count),
        "old_logprob": logprob - draw.normal(0, 0.2, count),
        "old_entropy": draw.uniform(0, 4, count),
        "rollout_logprob": logprob - draw.normal(0, 0.4, count),
        "reference_logprob": logprob - draw.normal(0, 0.4, count),
    }
    policy = Policy(**{name: torch.from_numpy(x).float() for name, x in values.items()})
    for number, (prompt, response) in enumerate(((2, 9), (1, 1), (3, 12), (1, 6))):
        ids = np.arange(first, first + prompt + response)
        first += len(ids)
        mask = draw.random(response) < 0.7
        mask[0] = True
        answer = ids[prompt:]
        sequences.append(
            TrainSequence(
                ids[:prompt], answer, policy.rollout_logprob[answer].numpy(),
                advantage=(1.3, -0.8, 0.6, -1.1)[number], loss_mask=mask,
                old_logprobs=policy.old_logprob[answer].numpy(),
                old_entropies=policy.old_entropy[answer].numpy(),
            )
        )  # fmt: skip
    return sequences, policy


def with_signs(sequences: list[TrainSequence], signs: tuple[int, ...]) -> list[TrainSequence]:
    pairs = zip(sequences, signs, strict=True)
    return [replace(sequence, zero_variance=sign) for sequence, sign in pairs]


def run(algorithm: Algorithm, ranks: int, known: bool = True, signs=(0, 0, 0, 0)):
    """Loss, gradients of the log-prob and entropy of each token id, and metrics of all ranks."""
    sequences, policy = make_case()
    sequences = with_signs(sequences, signs)
    if not known:
        sequences = [replace(s, old_logprobs=None, old_entropies=None) for s in sequences]
    totals = batch_totals(sequences, **TOTALS)
    objective = load_objective(algorithm)
    barrier, parts, results = threading.Barrier(ranks), [None] * ranks, [None] * ranks
    turn = threading.local()

    def all_reduce(values, group):
        parts[turn.rank] = values.clone()
        barrier.wait(30)
        values.copy_(sum(parts))
        barrier.wait(30)

    def train(rank: int) -> None:
        turn.rank = rank
        recorded = []
        loss_function = PolicyLoss(
            objective, algorithm, SimpleNamespace(size=lambda: ranks), VOCAB,
            record=lambda batch, segments: recorded.append((batch, segments)),
        )  # fmt: skip
        spec = PackingSpec(16, 0, 1, context_parallel_rank=rank, context_parallel_size=ranks)
        leaf = torch.stack([policy.logprob, policy.entropy]).requires_grad_()
        total, count, metrics = 0.0, 0, []
        for batch in pack(sequences, totals, spec):
            batch = replace(batch, reference_logprob=policy.reference_logprob[batch.targets])
            output = leaf[:, batch.targets]
            scored = loss_function(batch, output, non_loss_data=True)
            assert torch.equal(scored, output) and not scored.requires_grad
            loss, tokens, report = loss_function(batch, output)
            assert recorded[-1][0] is batch
            assert len(recorded[-1][1].segment) == int(batch.lengths.sum())
            total, count = total + loss, count + int(tokens)
            metrics.append(report)
        (gradient,) = torch.autograd.grad(total, leaf)
        assert len(recorded) == len(metrics) > 1 and count == (
            totals.num_tokens if rank == 0 else 0
        )
        # The last line: an exception in this thread leaves no result.
        results[rank] = total.detach() / totals.num_tokens, gradient / totals.num_tokens, metrics

    patched = pytest.MonkeyPatch()
    patched.setattr(loss_module, "dist", SimpleNamespace(all_reduce=all_reduce))
    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(ranks)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        patched.undo()
    losses, gradients, reports = zip(*results, strict=True)
    metrics: dict[str, float] = {}
    for report in (report for rank in reports for report in rank):
        for name, value in report.items():
            metrics[name] = metrics.get(name, 0.0) + float(value)
    return float(sum(losses)), sum(gradients), metrics


def reference(algorithm: Algorithm, known: bool = True, signs=(0, 0, 0, 0)):
    """The same from the equations, in plain floats."""
    sequences, policy = make_case()
    if not known:
        policy.old_logprob, policy.old_entropy = policy.logprob, policy.entropy
    trained = [s.trained(s.response_ids).tolist() for s in sequences]

    def take(values: torch.Tensor, ids: list[int]) -> list[float]:
        return values[ids].tolist()

    def advantages(sequence: TrainSequence, ids: list[int], sign: int) -> list[float]:
        """RL-ZVP: a reward grows with the entropy, a penalty with its distance to the highest."""
        entropy, a = take(policy.old_entropy, ids), sequence.advantage
        return [a * (e if sign > 0 else max(entropy) - e if sign < 0 else 1) for e in entropy]

    responses = [
        Response(
            take(policy.logprob, ids), take(policy.old_logprob, ids),
            take(policy.old_entropy, ids), advantages(s, ids, sign),
        )
        for s, ids, sign in zip(sequences, trained, signs, strict=True)
    ]  # fmt: skip
    low, high = BOUNDS[algorithm.objective]
    answer = expected(
        responses,
        Rules(algorithm.objective, low, high),
        num_responses=TOTALS["num_responses"],
        num_tokens=TOTALS["num_response_tokens"],
        max_tokens=99,
        vocab=VOCAB,
    )
    loss, gradient, t = 0.0, torch.zeros(2, 60), 0
    weights, kls, masked = [], [], 0
    for ids in trained:
        exponents = (policy.old_logprob - policy.rollout_logprob)[ids].tolist()
        for place, token in enumerate(ids):
            ratios = {
                "token": math.exp(exponents[place]),
                "sequence": math.exp(sum(exponents)),
                "geometric": math.exp(sum(exponents) / len(exponents)),
            }
            factor, mode = 1.0, algorithm.rollout_correction
            if mode != "off":
                ratio = ratios["token" if mode == "metrics" else mode]
                weights.append(max(min(ratio, CAP), algorithm.rollout_correction_floor))
                factor = 1.0 if mode == "metrics" else weights[-1]
            for level, (lowest, highest) in algorithm.rollout_mask.items():
                factor = factor if lowest <= ratios[level] <= highest else 0.0
            masked += factor == 0
            r = float(policy.reference_logprob[token] - policy.logprob[token])
            kls.append(math.exp(r) - 1 - r)
            entropy = float(policy.entropy[token])
            weight = answer.weight[t]
            penalty = algorithm.kl_coef * kls[-1] - algorithm.entropy_coef * entropy
            loss += weight * (penalty - factor * answer.value[t])
            gradient[0, token] = factor * answer.gradient[t] + weight * algorithm.kl_coef * (
                1 - math.exp(r)
            )
            gradient[1, token] = -weight * algorithm.entropy_coef
            t += 1
    old_entropy = sum(float(policy.old_entropy[token]) for ids in trained for token in ids)
    return loss, gradient, {
        "weights": weights, "kls": kls, "old_entropy": old_entropy, "masked": masked
    }  # fmt: skip


CASES = [
    {
        "objective": "espo",
        "rollout_correction": "sequence",
        "kl_coef": 0.3,
        "entropy_coef": 0.1,
        "rollout_mask": {"sequence": [0.1, 3.0]},
    },
    {
        "objective": "gspo",
        "rollout_correction": "token",
        "rollout_correction_floor": 0.8,
        "rollout_mask": {"token": [0.8, CAP], "geometric": [0.8, 1.29]},
    },
    {"objective": "grpo", "rollout_correction": "geometric", "rollout_correction_floor": 1.0},
    {"objective": "dapo", "rollout_correction": "metrics", "kl_coef": 0.2},
    {
        "objective": "cispo",
        "rollout_correction": "off",
        "entropy_coef": 0.2,
        "rollout_mask": {"geometric": [0.75, 1.25]},
    },
]


@pytest.mark.parametrize("known", [True, False], ids=["frozen", "on policy"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["objective"])
def test_loss_gradient_and_metrics_equal_reference(case, ranks, known):
    algorithm = Algorithm(**case, rollout_correction_cap=CAP)
    loss, gradient, metrics = run(algorithm, ranks, known)
    wanted_loss, wanted_gradient, wanted = reference(algorithm, known)
    assert loss == pytest.approx(wanted_loss, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-7)
    assert metrics["sum/policy/entropy"] == pytest.approx(wanted["old_entropy"], rel=1e-5)
    weights = wanted["weights"]
    assert ("sum/rollout_correction/weight" in metrics) == bool(weights)
    if weights:
        assert metrics["sum/rollout_correction/weight"] == pytest.approx(sum(weights), rel=1e-4)
        limits = (algorithm.rollout_correction_floor, CAP)
        limited = sum(weight in limits for weight in weights)
        assert 0 < limited < len(weights)
        assert metrics["sum/rollout_correction/limited"] == limited
    if algorithm.rollout_mask:
        assert 0 < wanted["masked"] == metrics["sum/rollout_correction/masked"] < 19
    assert metrics["sum/kl/reference"] == pytest.approx(sum(wanted["kls"]), rel=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("objective", ["espo", "grpo"])
def test_entropies_shape_the_advantages_of_equal_rewards(objective, ranks):
    algorithm, signs = Algorithm(objective=objective, rollout_correction="off"), (0, -1, 1, -1)
    loss, gradient, _ = run(algorithm, ranks, signs=signs)
    wanted_loss, wanted_gradient, _ = reference(algorithm, signs=signs)
    assert loss == pytest.approx(wanted_loss, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(gradient, run(algorithm, ranks)[1])


@dataclass(frozen=True, kw_only=True)
class EntropyOnly(Objective):
    """An objective whose loss is an entropy bonus."""

    segmentation = "token"
    aggregation = "response"
    uses_entropy = True

    def loss(self, inputs: LossInputs) -> LossOutput:
        ones = torch.ones_like(inputs.entropy)
        return inputs.output(inputs.entropy, ones, torch.zeros_like(ones).bool())


@pytest.mark.parametrize(
    "algorithm",
    [
        {"objective": "dr_grpo", "advantage": "dr_grpo", "entropy_coef": 0.3},
        {"objective": f"{__name__}:EntropyOnly"},
    ],
    ids=["dr_grpo", "own"],
)
def test_forward_step_trains_the_hidden_states(algorithm, monkeypatch):
    """From hidden states to the loss of an unchanged policy, against dense float64 logits."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    algorithm = Algorithm(**algorithm)
    sequences, policy = make_case()
    sequences = [replace(s, old_logprobs=None, old_entropies=None) for s in sequences]
    totals = batch_totals(sequences, **TOTALS)
    (batch,) = pack(sequences, totals, PackingSpec(99, 0, 1))
    draw = torch.Generator().manual_seed(2)
    hidden = torch.randn(*batch.tokens.t().shape, 8, generator=draw).requires_grad_()
    weight = torch.randn(VOCAB + 5, 8, generator=draw)  # five padded columns

    def model(input_ids, position_ids, attention_mask, packed_seq_params, **head):
        assert torch.equal(input_ids, batch.tokens) and attention_mask is None
        assert torch.equal(position_ids, batch.position_ids)
        for side in ("q", "kv"):
            found = getattr(packed_seq_params, f"cu_seqlens_{side}")
            assert torch.equal(found, batch.cu_seqlens)
            assert getattr(packed_seq_params, f"max_seqlen_{side}") == batch.max_seqlen
        layer = SimpleNamespace(weight=weight, sequence_parallel=False)
        return head["output_processor"](
            hidden_states=hidden, output_layer=layer, output_weight=None,
            context=head["output_processor_context"],
        )  # fmt: skip

    recorded, replayed = [], []
    replay = SimpleNamespace(
        give=lambda *seen: replayed.append(("give", *seen)),
        follow=lambda *seen: replayed.append(("follow", *seen)),
    )
    options = {
        "groups": SimpleNamespace(tp=None, cp=SimpleNamespace(size=lambda: 1)),
        "vocab_size": VOCAB, "temperature": 0.7, "max_response_tokens": 16,
        "record": lambda *seen: recorded.append(seen), "router_replay": replay,
    }  # fmt: skip
    with pytest.raises(ValueError, match="budget_bytes is 1"):
        make_forward_step(algorithm, **options, head_budget_bytes=1)(iter([batch]), model)
    replayed.clear()
    output, loss_function = make_forward_step(algorithm, **options)(iter([batch]), model)
    assert replayed == [("give", model, None), ("follow", model, None, output)]
    loss, count, _ = loss_function(output)
    loss.backward()
    assert len(recorded) == 1 and int(count) == totals.num_tokens

    leaf = hidden.detach().double().requires_grad_()
    logits = leaf.flatten(0, 1)[batch.logit_positions] @ weight.double().t()
    logprob, entropy = dense(logits, batch.targets, 0.7, VOCAB)
    if algorithm.objective == "dr_grpo":
        expected_loss = -(batch.advantage * logprob + 0.3 * entropy).sum() / (9 * 16)
    else:
        lengths = batch.lengths.repeat_interleave(batch.lengths)
        expected_loss = -(entropy / (9 * lengths)).sum()
    expected_loss.backward()
    torch.testing.assert_close(
        hidden.grad.double() / totals.num_tokens, leaf.grad, rtol=1e-4, atol=1e-7
    )
