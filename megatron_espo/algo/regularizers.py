"""What may stand beside the objective: truncated importance sampling against the engine's mismatch, and KL to a reference."""

import torch
from torch import Tensor

from megatron_espo.algo.objectives import MAX_EXPONENT, Reduce


def rollout_correction(
    old_logprob: Tensor,
    rollout_logprob: Tensor,
    annotation,
    *,
    level: str,
    cap: float,
    reduce_segments: Reduce | None = None,
) -> Tensor:
    """Truncated importance sampling: ``min(π_old / π_rollout, cap)``, the trainer's probability over the engine's.

    The engine computes with other kernels than the trainer, so the responses come from a slightly different policy.

    Args:
        old_logprob, rollout_logprob: ``[tokens]`` float32, nats, of the same sampled tokens.
        annotation: :class:`~megatron_espo.algo.segments.Annotation` of the same tokens.
        level: ``token``, a ratio for each token, or ``sequence``, the product of a response's.
        cap: the largest ratio.
        reduce_segments: sums a vector over context-parallel ranks; ``sequence`` uses it.

    Returns:
        ``[tokens]`` float32, detached; a factor of each token's weight.
    """
    exponent = (old_logprob - rollout_logprob).detach()
    if level == "sequence":
        sums = exponent.new_zeros(annotation.length.numel()).index_add_(0, annotation.response, exponent)
        exponent = (sums if reduce_segments is None else reduce_segments(sums))[annotation.response]
    return exponent.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp().clamp(max=cap)


def kl_estimate(logprob: Tensor, reference_logprob: Tensor) -> Tensor:
    """Schulman's k3 estimator of KL(π_θ || π_ref) at each sampled token: ``exp(r) - 1 - r`` with ``r = log π_ref - log π_θ``.

    It is unbiased and never negative.

    Args:
        logprob: ``[tokens]`` float32, nats, with gradient.
        reference_logprob: ``[tokens]`` float32, nats, of the frozen reference.

    Returns:
        ``[tokens]``, nats, with gradient.
    """
    clamped = (reference_logprob - logprob).clamp(-MAX_EXPONENT, MAX_EXPONENT)
    return torch.expm1(clamped) - clamped
