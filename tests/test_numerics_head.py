"""The linear head against unfused float64: values, gradients, memory, Megatron's main_grad."""

import pytest
import torch

from benchmarks.measure import peak_bytes
from megatron_espo.numerics import linear_logprob_entropy, plan_head
from tests.support.distributed import run_ranks
from tests.support.ranks.numerics import assert_close, dense, kept_ids
from tests.test_numerics import DEVICE, TRITON

TOKENS, WIDTH, VOCAB, HIDDEN = 50, 700, 690, 24
ROW = WIDTH * 4
every_path = pytest.mark.parametrize("path", ["torch", TRITON])


def inputs(dtype=torch.float32, tokens=TOKENS):
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(WIDTH, HIDDEN, generator=generator).to(DEVICE, dtype)
    targets = torch.randint(0, VOCAB, (tokens,), generator=generator).to(DEVICE)
    weights = torch.randn(2, tokens, generator=generator).to(DEVICE)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, weights


def unfused(hidden, weight, targets, weights, temperature=0.9):
    """Loss, log-prob, entropy and gradients from whole float64 logits."""
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logprob, entropy = dense(h @ w.t(), targets, temperature, VOCAB)
    ((logprob * weights[0]).sum() + (entropy * weights[1]).sum()).backward()
    return logprob, entropy, h.grad, w.grad


def fused(hidden, weight, targets, weights, **options):
    options = {"temperature": 0.9, "vocab_size": VOCAB, "entropy_grad": True} | options
    logprob, entropy = linear_logprob_entropy(hidden, weight, targets, None, **options)
    return logprob, entropy, (logprob * weights[0]).sum() + (entropy * weights[1]).sum()


@every_path
@pytest.mark.parametrize(
    "budget", [None, 7 * ROW, ROW], ids=["everything", "seven rows", "one row"]
)
def test_equals_unfused(path, budget):
    hidden, weight, targets, weights = inputs()
    logprob, entropy, loss = fused(hidden, weight, targets, weights, budget_bytes=budget, path=path)
    loss.backward(retain_graph=True)
    expected = unfused(hidden, weight, targets, weights)
    for actual, wanted in zip((logprob, entropy, hidden.grad, weight.grad), expected, strict=True):
        assert_close(actual, wanted, 1e-5)
    again = torch.autograd.grad(loss, (hidden, weight))  # the kept logits are overwritten by now
    assert_close(again[0], expected[2], 1e-5)
    assert_close(again[1], expected[3], 1e-5)


@every_path
@pytest.mark.parametrize("budget", [None, 9 * 6 * WIDTH], ids=["kept", "recomputed"])
def test_bfloat16(path, budget):
    """Float32 logits are exact in forward; kept ones are rounded relative to their tile."""
    hidden, weight, targets, weights = inputs(torch.bfloat16)
    weight.main_grad = torch.zeros(WIDTH, HIDDEN, device=DEVICE)
    weight.grad_added_to_main_grad = False
    logprob, entropy, loss = fused(
        hidden,
        weight,
        targets,
        weights,
        budget_bytes=budget,
        path=path,
    )
    loss.backward()
    expected = unfused(hidden, weight, targets, weights)
    assert_close(logprob, expected[0], 5e-6)
    assert_close(entropy, expected[1], 5e-6)
    for actual, wanted in ((hidden.grad, expected[2]), (weight.main_grad, expected[3])):
        assert (actual.double() - wanted).norm() <= 0.01 * wanted.norm()


@pytest.mark.parametrize("main_grad", [False, True])
def test_weight_gradient_is_summed_in_float32(main_grad):
    """2,000 chunks of one token: a bfloat16 sum would stop growing after a few hundred."""
    hidden, weight, targets, _ = inputs(torch.bfloat16)
    hidden, targets = (
        hidden[:1].detach().expand(2000, -1).contiguous(),
        targets[:1].expand(2000).contiguous(),
    )

    def gradient(tokens):
        weight.grad = None
        if main_grad:
            weight.main_grad, weight.grad_added_to_main_grad = (
                torch.zeros(WIDTH, HIDDEN, device=DEVICE),
                False,
            )
        arguments = hidden[:tokens], weight, targets[:tokens], None
        linear_logprob_entropy(*arguments, vocab_size=VOCAB, budget_bytes=6 * WIDTH)[
            0
        ].sum().backward()
        return (weight.main_grad if main_grad else weight.grad).double()

    # The budget keeps the logits of one token, but not those of two.
    assert_close(gradient(2000) / 2000, gradient(2) / 2, 1e-4 if main_grad else 2**-7)


@pytest.mark.parametrize("tied", [False, True])
def test_main_grad_rules(tied):
    """Megatron's DDP hook gets the whole gradient of two micro-batches, with the embedding's."""
    hidden, weight, targets, weights = inputs()
    weight.main_grad = torch.zeros_like(weight)
    weight.grad_added_to_main_grad = False
    weight.zero_out_wgrad = tied

    def hook(
        parameter,
    ):  # megatron.core.distributed.DistributedDataParallel._make_backward_post_hook
        assert parameter.grad is not None
        if not parameter.grad_added_to_main_grad or parameter.zero_out_wgrad:
            parameter.main_grad.add_(parameter.grad)
        parameter.grad = None

    weight.register_post_accumulate_grad_hook(hook)
    for _ in range(2):
        loss = fused(hidden, weight, targets, weights)[2]
        if tied:
            loss = loss + 3.0 * torch.nn.functional.embedding(targets, weight).sum()
        loss.backward()
        assert weight.grad_added_to_main_grad
    expected = unfused(hidden, weight, targets, weights)[3]
    if tied:
        expected = expected + 3.0 * torch.bincount(targets, minlength=WIDTH).double()[:, None]
    assert_close(weight.main_grad, 2 * expected, 2e-5)


@pytest.mark.parametrize("budget", [None, ROW], ids=["kept", "one row"])
def test_positions_and_frozen_weight(budget):
    hidden, weight, targets, weights = inputs()
    positions = torch.tensor([3, 9, 8, 40], device=DEVICE)
    arguments = (hidden, weight.detach(), targets[:4], weights[:, :4])
    loss = fused(*arguments, positions=positions, budget_bytes=budget)[2]
    loss.backward()
    expected = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64, device=DEVICE)
    expected[positions] = unfused(hidden[positions], weight, targets[:4], weights[:, :4])[2]
    assert_close(hidden.grad, expected, 1e-5)


@every_path
def test_repeated_positions_add_their_gradients(path):
    hidden, weight, targets, weights = inputs()
    positions = torch.tensor([3, 9, 3, 3], device=DEVICE)
    fused(hidden, weight, targets[:4], weights[:, :4], positions=positions, path=path)[2].backward()
    expected = unfused(hidden[positions], weight, targets[:4], weights[:, :4])
    whole = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64, device=DEVICE)
    for position, row in zip(positions, expected[2], strict=True):
        whole[position] += row
    assert_close(hidden.grad, whole, 1e-5)
    assert_close(weight.grad, expected[3], 1e-5)


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", [None, 7 * ROW], ids=["kept", "recomputed"])
def test_padded_rows_of_the_weight_are_not_read(path, dtype, budget):
    found = []
    not_finite = torch.tensor([[torch.nan], [torch.inf]] * 5, device=DEVICE)
    for padding in (0.0, not_finite):
        hidden, weight, targets, weights = inputs(dtype)
        with torch.no_grad():
            weight[VOCAB:] = padding
        logprob, entropy, loss = fused(
            hidden, weight, targets, weights, budget_bytes=budget, path=path
        )
        loss.backward()
        found.append((logprob, entropy, hidden.grad, weight.grad))
    for clean, padded in zip(*found, strict=True):
        assert torch.equal(clean, padded)
    assert not weight.grad[VOCAB:].any()


def test_entropy_without_gradient_is_not_differentiable():
    """A loss that uses it by mistake is refused, or has no part in the gradient."""
    hidden, weight, targets, _ = inputs()
    logprob, entropy = linear_logprob_entropy(hidden, weight, targets, None)
    assert logprob.requires_grad and not entropy.requires_grad


def test_no_tokens():
    hidden, weight, targets, _ = inputs()
    nothing = torch.empty(0, dtype=torch.int64, device=DEVICE)
    logprob, _ = linear_logprob_entropy(
        hidden, weight, nothing, None, positions=nothing, vocab_size=VOCAB
    )
    logprob.sum().backward()
    assert logprob.shape == (0,) and not hidden.grad.any() and not weight.grad.any()


def test_finite_differences():
    hidden, weight = torch.randn(4, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    targets = torch.tensor([0, 4, 2, 1])

    def values(h, w):
        return torch.stack(
            linear_logprob_entropy(
                h, w, targets, None, vocab_size=5, entropy_grad=True, budget_bytes=6 * 8 * 3
            )
        )

    assert torch.autograd.gradcheck(values, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [512, 4096])
def test_memory_follows_the_plan(tokens, dtype):
    """Peak memory of recomputing, scoring and keeping is at most that of the plan."""
    width, size = 20000, 16
    hidden = torch.randn(tokens, size, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(width, size, device=DEVICE).to(dtype).requires_grad_()
    targets = torch.zeros(tokens, dtype=torch.int64, device=DEVICE)
    chunk = 128 * width * 4
    small = (
        0.1 * chunk + 2 * (size * width + size * tokens) * 4 + 100 * tokens
    )  # gradients, per-token numbers, blocks

    def train(budget):
        out = linear_logprob_entropy(hidden, weight, targets, None, budget_bytes=budget)[0]
        return torch.autograd.grad(out.sum(), (hidden, weight))

    plan = plan_head(tokens, width, dtype=dtype, budget_bytes=2 * chunk)
    assert not plan.keep_logits
    train(None)  # the library allocates its workspace once
    peak = peak_bytes(lambda: train(2 * chunk))
    assert peak <= plan.training_bytes + small <= 2 * chunk + small
    with torch.no_grad():
        scoring = peak_bytes(lambda: linear_logprob_entropy(hidden, weight, targets, None))
    everything = plan_head(tokens, width, dtype=dtype)
    assert scoring <= everything.chunk_tokens * width * 4 + small + 100 * tokens
    kept = peak_bytes(lambda: train(None))
    assert tokens * width * dtype.itemsize <= kept <= everything.training_bytes + small


def test_plan():
    one = plan_head(4096, 1000, dtype=torch.float32, budget_bytes=4000)
    assert (one.keep_logits, one.chunk_tokens, one.training_bytes) == (False, 1, 4000)
    assert plan_head(4096, 1000, dtype=torch.float32, budget_bytes=4096 * 4000).keep_logits
    assert not plan_head(4096, 1000, dtype=torch.float32, budget_bytes=4096 * 4000 - 1).keep_logits
    for tokens in (1, 100, 5000):
        for budget in (6 * 1000, 10**6, 2 * 10**6, 10**8):
            plan = plan_head(tokens, 1000, dtype=torch.bfloat16, budget_bytes=budget)
            assert 0 < plan.training_bytes <= budget and 1 <= plan.chunk_tokens <= tokens
    with pytest.raises(ValueError, match="6000 bytes for one token of 1000 columns"):
        plan_head(1, 1000, dtype=torch.bfloat16, budget_bytes=5999)


@every_path
@pytest.mark.parametrize("budget", [None, 7 * ROW], ids=["kept", "seven rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sampling_mask(path, budget, dtype):
    """Log-prob, entropy and gradients of the distribution over the kept ids."""
    hidden, weight, targets, weights = inputs(dtype)
    mask, allowed = kept_ids(targets, VOCAB)
    logprob, entropy, loss = fused(
        hidden, weight, targets, weights, budget_bytes=budget, path=path, sampling_mask=mask,
    )  # fmt: skip
    loss.backward()
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logits = (h @ w.t())[:, :VOCAB].masked_fill(~allowed, -torch.inf)
    expected = dense(logits, targets, 0.9, VOCAB)
    ((expected[0] * weights[0]).sum() + (expected[1] * weights[1]).sum()).backward()
    assert logprob[0] == entropy[0] == 0
    assert_close(logprob, expected[0], 5e-6)
    assert_close(entropy, expected[1], 5e-6)
    for actual, wanted in ((hidden.grad, h.grad), (weight.grad, w.grad)):
        tolerance = 1e-5 if dtype == torch.float32 else 0.01
        assert (actual.double() - wanted).norm() <= tolerance * wanted.norm()


def test_wrong_arguments():
    hidden, weight, targets, _ = inputs()
    with pytest.raises(ValueError, match="of one dtype"):
        linear_logprob_entropy(hidden.bfloat16(), weight, targets, None)
    with pytest.raises(ValueError, match="targets must be int64"):
        linear_logprob_entropy(hidden, weight, targets[:-1], None)


def test_two_ranks():
    """With and without sequence parallelism, with a subset of positions, kept and recomputed, of
    all ids and of kept ids."""
    run_ranks(2, "tests.support.ranks.numerics:check_head")
