"""Log-prob and entropy of a tensor-parallel logits shard, in one pass and one collective, with gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_espo.numerics import paths
from megatron_espo.numerics.collectives import all_gather
from megatron_espo.numerics.statistics import gradient_terms, logprob_and_entropy, merge


def vocab_parallel_logprob_entropy(
    logits: Tensor,
    targets: Tensor,
    group: dist.ProcessGroup | None,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    entropy_grad: bool = False,
    donate_logits: bool = False,
    path: paths.Path = "auto",
) -> tuple[Tensor, Tensor]:
    """Per token ``log π(y)`` and ``H = -Σ π log π`` of ``π = softmax(logits / temperature)`` over the true vocabulary.

    One collective: an all-gather of ``[tokens, 4]`` float32 over ``group`` (none if it is None); none in backward.
    The logits are the only large tensor kept for backward.

    Args:
        logits: ``[tokens, vocab/tp]``, float32, bfloat16, float16 or float64. Rank ``r`` of the group holds the columns
            from ``r·vocab/tp`` on. Never written to, unless donated. ``-inf`` takes no probability.
        targets: ``[tokens]`` int64, global token ids. An id that no true column has gets log-prob ``-inf``.
        group: the tensor-parallel process group, or None for the whole vocabulary on one rank.
        temperature: the sampling temperature; divides the logits.
        vocab_size: true vocabulary; columns from here on take no probability and get gradient 0. Default: every column.
        entropy_grad: make the entropy differentiable (detached otherwise).
        donate_logits: the caller will not read the logits again: backward writes the gradient into their memory.
            A second backward then raises RuntimeError.
        path: ``"auto"`` picks Triton on GPUs, compiled torch for large shards on CPU, plain torch otherwise.

    Returns:
        ``(logprob, entropy)``, each ``[tokens]``, nats, float32 (float64 for float64 logits), the same on every rank.

    Raises:
        ValueError: shapes, dtypes or sizes that do not fit together.
    """
    size = 1 if group is None else group.size()
    check_arguments(targets, logits.shape, size, temperature, vocab_size)
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits.dtype}")
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    shard = Shard(logits.shape[1], group, vocab_size, 1.0 / temperature)
    path = paths.choose(path, logits.device, logits.dtype, logits.numel())
    return _LogprobEntropy.apply(logits, targets, shard, entropy_grad, donate_logits, path)


def check_arguments(
    targets: Tensor, shard_shape: tuple[int, ...], size: int, temperature: float, vocab_size: int | None
) -> None:
    """Raise ValueError unless the arguments describe one ``[tokens, vocab/tp]`` shard."""
    if len(shard_shape) != 2:
        raise ValueError(f"logits must be [tokens, vocab/tp], got {tuple(shard_shape)}: flatten the leading dimensions")
    if targets.shape != shard_shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [{shard_shape[0]}], got {targets.dtype} {tuple(targets.shape)}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}; score greedy samples at 1")
    if vocab_size is not None and not 0 < vocab_size <= shard_shape[1] * size:
        raise ValueError(
            f"vocab_size must lie in 1..{shard_shape[1] * size} ({size} x {shard_shape[1]} columns), got {vocab_size}"
        )


class Shard:
    """Where a rank's columns lie in the vocabulary, and how shards are merged."""

    def __init__(self, width: int, group: dist.ProcessGroup | None, vocab_size: int | None, scale: float) -> None:
        self.group, self.scale = group, scale
        self.first = 0 if group is None else group.rank() * width
        self.columns = width if vocab_size is None else min(max(vocab_size - self.first, 0), width)

    def local(self, targets: Tensor) -> Tensor:
        """Targets as columns of this shard."""
        return targets - self.first

    def merge(self, stats: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(m, a, b, y)`` of the whole vocabulary from each rank's ``[tokens, 4]``. One all-gather."""
        parts = stats.unsqueeze(0)
        if self.group is not None and self.group.size() > 1 and stats.numel():
            parts = stats.new_empty(self.group.size(), *stats.shape)
            all_gather(parts.flatten(0, 1), stats, self.group)
        m, a, b, y = parts.unbind(-1)
        return *merge(m, a, b, self.scale, dim=0), y.amax(0)


class _LogprobEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, shard: Shard, entropy_grad: bool, donate: bool, path: paths.Path
    ) -> tuple[Tensor, Tensor]:
        stats, _ = paths.statistics(path, logits, shard.columns, shard.local(targets), shard.scale)
        merged = shard.merge(stats)
        logprob, entropy = logprob_and_entropy(*merged, shard.scale)
        ctx.save_for_backward(logits, targets, *merged)
        ctx.shard, ctx.donate, ctx.path, ctx.spent = shard, donate, path, False
        ctx.set_materialize_grads(False)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None):
        if ctx.spent:
            raise RuntimeError("second backward: donated logits are overwritten by the first; pass donate_logits=False")
        logits, targets, *merged = ctx.saved_tensors
        shard: Shard = ctx.shard
        terms = gradient_terms(*merged, shard.scale, grad_logprob, grad_entropy)
        ctx.spent = ctx.donate
        out = logits.detach() if ctx.donate else torch.empty_like(logits)
        paths.gradient(
            ctx.path, logits, out, shard.columns, shard.local(targets), terms, shard.scale, grad_entropy is not None
        )
        return out, None, None, None, None, None
