"""Reference and multi-rank bodies for tests/test_numerics*.py."""

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.measure import counted_collectives
from megatron_espo.numerics import linear_logprob_entropy, vocab_parallel_logprob_entropy


def dense(
    logits: Tensor, targets: Tensor, temperature: float, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy in float64, straight from the definition; differentiable."""
    logp = torch.log_softmax(logits.double()[:, :vocab_size] / temperature, -1)
    finite = logp.masked_fill(logp == -torch.inf, 0.0)
    return logp.gather(1, targets[:, None]).squeeze(1), -(
        finite.exp() * finite * (logp > -torch.inf)
    ).sum(-1)


def kept_ids(targets, vocab_size: int):
    """A random sampling mask ``[2, kept]``; row 0 keeps the target only. Also as bool ``[tokens,
    vocab]``."""
    allowed = torch.rand(len(targets), vocab_size, generator=torch.Generator().manual_seed(1)) < 0.1
    allowed[0] = False
    allowed[torch.arange(len(targets)), targets.cpu()] = True
    return allowed.nonzero().t().int().to(targets.device), allowed.to(targets.device)


def hard_rows(
    width: int, vocab_size: int, dtype: torch.dtype, tokens: int = 24
) -> tuple[Tensor, Tensor]:
    """Logits ``[tokens, width]`` with edge cases and large padded columns, and targets."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(tokens, width, generator=generator) * 3
    targets = torch.randint(0, vocab_size, (tokens,), generator=generator)
    x[0] = 0.0  # uniform
    x[1] = -1e4  # uniform, all very negative
    x[2] -= 1e4
    x[3, 5], targets[3] = 500.0, 5  # one-hot
    x[4, 7:90], targets[4] = -torch.inf, 100
    x[5], x[5, 3] = 0.0, 16.0  # peaked: a long sum of tiny terms beside one large
    x[6, 1:], targets[6] = -torch.inf, 0  # a single possible token
    x[7, : vocab_size // 2], targets[7] = (
        -torch.inf,
        vocab_size - 1,
    )  # the first shard has no mass at all
    targets[8], targets[9] = 0, vocab_size - 1
    x = x.to(dtype)
    x[:, vocab_size:] = 1e4
    return x, targets


def check_shards(cases: list[dict], path: str) -> None:
    """Shards give the values and gradients of dense float64, with one all-gather."""
    for case in cases:
        width, vocab_size, temperature = case["width"], case["vocab_size"], case["temperature"]
        rank, size = dist.get_rank(), dist.get_world_size()
        whole, targets = hard_rows(width * size, vocab_size, torch.float32)
        mine = slice(rank * width, (rank + 1) * width)
        shard = whole[:, mine].clone().requires_grad_()
        with counted_collectives() as calls:
            logprob, entropy = vocab_parallel_logprob_entropy(
                shard, targets, dist.group.WORLD,
                temperature=temperature, vocab_size=vocab_size, entropy_grad=True, path=path,
            )  # fmt: skip
            (logprob.sum() + 0.3 * entropy.sum()).backward()
        assert calls == [("all_gather", 4 * 4 * len(targets))], calls
        reference = whole.double().requires_grad_()
        ref_logprob, ref_entropy = dense(reference, targets, temperature, vocab_size)
        (ref_logprob.sum() + 0.3 * ref_entropy.sum()).backward()
        assert_close(logprob, ref_logprob, 5e-6)
        assert_close(entropy, ref_entropy, 5e-6)
        assert_close(shard.grad, reference.grad[:, mine], 1.3e-6)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Absolute error, relative above 1: float32 rounds a log-prob of -1e4 to 5e-4."""
    error = (actual.detach().double() - expected.detach()).abs() / expected.detach().abs().clamp(
        min=1.0
    )
    worst = error.max().item() if error.numel() else 0.0
    assert worst <= tolerance, f"error {worst:.2e}, allowed {tolerance:.1e}"


def check_head() -> None:
    """The head over two vocabulary shards equals dense float64; collectives are counted."""
    generator = torch.Generator().manual_seed(5)
    tokens, width, depth, vocab_size = 12, 40, 6, 75
    hidden = torch.randn(tokens, depth, generator=generator)
    weight = torch.randn(width * dist.get_world_size(), depth, generator=generator)
    positions = torch.tensor([1, 2, 5, 6, 7, 10])
    for chosen in (torch.arange(tokens), positions):
        targets = torch.randint(0, vocab_size, (len(chosen),), generator=generator)
        _check_head(hidden, weight, chosen, targets, vocab_size, None)
        _check_head(hidden, weight, chosen, targets, vocab_size, kept_ids(targets, vocab_size))


def _check_head(hidden, weight, chosen, targets, vocab_size, kept) -> None:
    rank, size, (tokens, depth) = dist.get_rank(), dist.get_world_size(), hidden.shape
    width = len(weight) // size
    mine = slice(rank * width, (rank + 1) * width)
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = (h[chosen] @ w.t())[:, :vocab_size]
    if kept is not None:
        logits = logits.masked_fill(~kept[1], -torch.inf)
    reference = dense(logits, targets, 0.8, vocab_size)
    (reference[0].sum() + 0.5 * reference[1].sum()).backward()
    for sequence_parallel in (False, True):
        for budget in (None, width * 4 * 5):
            part = slice(None)
            if sequence_parallel:
                part = slice(rank * tokens // size, (rank + 1) * tokens // size)
            local_hidden = hidden[part].clone().requires_grad_()
            local_weight = weight[mine].clone().requires_grad_()
            with counted_collectives() as calls:
                out = linear_logprob_entropy(
                    local_hidden, local_weight, targets, dist.group.WORLD,
                    positions=None if len(chosen) == tokens else chosen, temperature=0.8,
                    vocab_size=vocab_size, entropy_grad=True,
                    sequence_parallel=sequence_parallel, budget_bytes=budget,
                    sampling_mask=kept and kept[0],
                )  # fmt: skip
                (out[0].sum() + 0.5 * out[1].sum()).backward()
            statistics = ("all_gather", 16 * len(chosen))
            if sequence_parallel:
                gather = ("all_gather", tokens // size * depth * 4)
                scatter = ("reduce_scatter", tokens * depth * 4)
                assert calls == [gather, statistics, gather, scatter], calls
            else:
                assert calls == [statistics, ("all_reduce", tokens * depth * 4)], calls
            assert_close(out[0], reference[0], 5e-6)
            assert_close(out[1], reference[1], 5e-6)
            assert_close(local_hidden.grad, h.grad[part], 5e-6)
            assert_close(local_weight.grad, w.grad[mine], 5e-6)
