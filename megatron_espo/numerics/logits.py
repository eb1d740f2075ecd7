"""Log-prob and entropy of vocabulary-parallel logits, in one pass and one collective."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_espo.numerics.shard import Path, Shard, check_targets, choose_path
from megatron_espo.numerics.statistics import logprob_and_entropy


def vocab_parallel_logprob_entropy(
    logits: Tensor,
    targets: Tensor,
    group: dist.ProcessGroup | None,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    entropy_grad: bool = False,
    donate_logits: bool = False,
    path: Path = "auto",
) -> tuple[Tensor, Tensor]:
    """Per token ``log π(y)`` and ``H = -Σ π log π`` of ``π = softmax(logits / temperature)``.

    One collective: an all-gather of ``[tokens, 4]`` float32 over ``group`` (none if it is None);
    none in backward. The logits are the only large tensor kept for backward.

    Args:
        logits: ``[tokens, vocab/tp]``, float32, bfloat16, float16 or float64. Rank ``r`` of the
            group holds the columns from ``r·vocab/tp`` on. They are never changed, unless donated.
            ``-inf`` has no probability.
        targets: ``[tokens]`` int64, global token ids. An id outside the true vocabulary has
            log-prob ``-inf``.
        group: tensor-parallel process group; None: the whole vocabulary is on this rank.
        temperature: the sampling temperature; divides the logits.
        vocab_size: true vocabulary; later columns have no probability and gradient 0. Default:
            every column.
        entropy_grad: make the entropy differentiable (detached otherwise).
        donate_logits: backward writes the gradient into the memory of the logits, which the caller
            must not read again. A second backward then raises RuntimeError.
        path: ``auto``: Triton on GPUs, compiled torch for large shards on CPU, else plain torch.

    Returns:
        ``(logprob, entropy)``, each ``[tokens]``, nats, float32 (float64 for float64 logits), the
        same on every rank.

    Raises:
        ValueError: shapes, dtypes or sizes that do not fit together.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        got = f"{logits.dtype} {list(logits.shape)}"
        raise ValueError(f"logits must be floating point [tokens, vocab/tp], got {got}")
    check_targets(targets, len(logits))
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    path = choose_path(path, logits, logits.numel())
    shard = Shard(logits.shape[1], group, vocab_size, temperature, path)
    return _LogprobEntropy.apply(logits, targets, shard, entropy_grad, donate_logits)


class _LogprobEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, shard: Shard, entropy_grad: bool, donate: bool
    ) -> tuple[Tensor, Tensor]:
        sums = shard.merge(shard.statistics(logits, targets)[0])
        logprob, entropy = logprob_and_entropy(sums, shard.scale)
        ctx.save_for_backward(logits, targets, sums)
        ctx.shard, ctx.donate, ctx.spent = shard, donate, False
        ctx.set_materialize_grads(False)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None):
        if ctx.spent:
            raise RuntimeError("second backward of donated logits; use donate_logits=False")
        logits, targets, sums = ctx.saved_tensors
        ctx.spent = ctx.donate
        out = logits.detach() if ctx.donate else torch.empty_like(logits)
        ctx.shard.gradient(logits, out, targets, sums, grad_logprob, grad_entropy)
        return out, None, None, None, None
