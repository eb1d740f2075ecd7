"""Correction for the engine's log-probs, and KL divergence to a reference."""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_espo.algo.base import MAX_EXPONENT
from megatron_espo.algo.segments import SumOverRanks, TokenSegments, as_float, sum_by_index

CorrectionLevel = Literal["token", "sequence", "geometric"]


def rollout_correction(
    old_logprob: Tensor,
    rollout_logprob: Tensor,
    segments: TokenSegments,
    *,
    level: CorrectionLevel,
    cap: float,
    floor: float = 0.0,
    sum_over_ranks: SumOverRanks = lambda sums: sums,
) -> Tensor:
    """Truncated importance sampling: ``clip(r, floor, cap)``, with ``r = π_old / π_rollout``.

    The engine computes with other kernels than the trainer, so it samples from a slightly different
    policy.

    Args:
        old_logprob, rollout_logprob: ``[tokens]`` float32, of the same sampled tokens (nats).
        segments: of the same tokens.
        level: ``token``: a ratio for each token; ``sequence``: the product over the response;
            ``geometric``: the geometric mean over the response.
        cap: the largest ratio.
        floor: the smallest ratio.
        sum_over_ranks: sums a vector over context-parallel ranks; ``token`` does not call it.

    Returns:
        ``[tokens]`` float32, detached: a factor of each token's weight.

    Raises:
        ValueError: an unknown level, or log-probs whose shape or device is not that of
            ``segments``.
    """
    ratio = _rollout_ratio(old_logprob, rollout_logprob, segments, level, sum_over_ranks)
    return ratio.clamp(floor, cap)


def rollout_mask(
    old_logprob: Tensor,
    rollout_logprob: Tensor,
    segments: TokenSegments,
    limits: Mapping[str, Sequence[float]],
    *,
    sum_over_ranks: SumOverRanks = lambda sums: sums,
) -> Tensor:
    """Masked importance sampling: the tokens with ``low <= r <= high`` at every given level.

    With ``{"token": (0.5, 5)}`` it is the mask of IcePop; ``sequence`` and ``geometric`` keep or
    drop whole responses. A dropped token has weight 0; ``N`` and ``ΣT`` still count it.

    Args:
        limits: level to ``(low, high)``. One sum over context-parallel ranks for each level other
            than ``token``. The other arguments are those of :func:`rollout_correction`.

    Returns:
        ``[tokens]`` bool, True for the tokens to keep.

    Raises:
        ValueError: as :func:`rollout_correction`.
    """
    kept = torch.ones_like(segments.segment, dtype=torch.bool)
    for level, (low, high) in limits.items():
        ratio = _rollout_ratio(old_logprob, rollout_logprob, segments, level, sum_over_ranks)
        kept &= (ratio >= low) & (ratio <= high)
    return kept


def _rollout_ratio(
    old_logprob: Tensor,
    rollout_logprob: Tensor,
    segments: TokenSegments,
    level: str,
    sum_over_ranks: SumOverRanks,
) -> Tensor:
    levels = get_args(CorrectionLevel)
    if level not in levels:
        raise ValueError(f"level: expected one of {', '.join(levels)}, got {level!r}")
    old = as_float("old_logprob", old_logprob.detach(), segments.segment)
    exponent = old - as_float("rollout_logprob", rollout_logprob.detach(), segments.segment)
    if level != "token":
        sums = sum_over_ranks(sum_by_index(exponent, segments.response, segments.length.numel()))
        exponent = (sums / segments.length if level == "geometric" else sums)[segments.response]
    return exponent.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()


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
    reference = as_float("reference_logprob", reference_logprob, logprob)
    r = (reference - as_float("logprob", logprob, logprob)).clamp(-MAX_EXPONENT, MAX_EXPONENT)
    return torch.expm1(r) - r
