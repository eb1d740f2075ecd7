"""Correction for the engine's log-probs, and KL divergence to a reference."""

import torch
from torch import Tensor

from megatron_espo.algo.objectives import MAX_EXPONENT
from megatron_espo.algo.segments import SumOverRanks, TokenSegments, as_float, sum_by_index

LEVELS = ("token", "sequence")


def rollout_correction(
    old_logprob: Tensor,
    rollout_logprob: Tensor,
    segments: TokenSegments,
    *,
    level: str,
    cap: float,
    sum_over_ranks: SumOverRanks = lambda sums: sums,
) -> Tensor:
    """Truncated importance sampling: ``min(π_old / π_rollout, cap)``, trainer over engine.

    The engine computes with other kernels than the trainer, so it samples from a slightly different
    policy.

    Args:
        old_logprob, rollout_logprob: ``[tokens]`` float32, of the same sampled tokens (nats).
        segments: of the same tokens.
        level: ``token``: a ratio for each token; ``sequence``: the product over the response.
        cap: the largest ratio.
        sum_over_ranks: sums a vector over context-parallel ranks; only ``sequence`` calls it.

    Returns:
        ``[tokens]`` float32, detached: a factor of each token's weight.

    Raises:
        ValueError: an unknown level, a cap that is not positive, or log-probs whose shape or device
            is not that of ``segments``.
    """
    if level not in LEVELS:
        raise ValueError(f"level: expected one of {', '.join(LEVELS)}, got {level!r}")
    if not cap > 0:
        raise ValueError(f"cap: expected a positive number, got {cap}")
    old = as_float("old_logprob", old_logprob.detach(), segments.segment)
    exponent = old - as_float("rollout_logprob", rollout_logprob.detach(), segments.segment)
    if level == "sequence":
        sums = sum_by_index(exponent, segments.response, segments.length.numel())
        exponent = sum_over_ranks(sums)[segments.response]
    return exponent.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp().clamp(max=cap)


def kl_estimate(logprob: Tensor, reference_logprob: Tensor) -> Tensor:
    """Schulman's k3 estimator of KL(π_θ || π_ref): ``exp(r) - 1 - r``.

    ``r`` is ``log π_ref - log π_θ``. The estimate is unbiased and never negative.

    Args:
        logprob: ``[tokens]`` float32 with gradient (nats).
        reference_logprob: ``[tokens]`` float32, of the frozen reference (nats).

    Returns:
        ``[tokens]`` with gradient (nats).

    Raises:
        ValueError: the two differ in shape or device.
    """
    r = as_float("reference_logprob", reference_logprob, logprob) - as_float(
        "logprob", logprob, logprob
    )
    r = r.clamp(-MAX_EXPONENT, MAX_EXPONENT)
    return torch.expm1(r) - r
