"""ESPO and its relatives as one formulation: segments, bounds, weights and a surrogate.

All tokens of a segment share one importance ratio; each token carries its own clip bounds and weight. A new objective
is one :class:`Objective` in :data:`OBJECTIVES`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Exponents are clamped before exp: one wild token must not turn a step into inf.
MAX_EXPONENT = 20.0

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """How an objective differs from the others.

    Attributes:
        segments: what shares a ratio: ``entropy`` groups, the ``response``, or each ``token``.
        weights: what counts the same: every ``segment`` of a response (``1/(N K_i n_σ)``), every ``response``
            (``1/(N T_i)``), every ``token`` (``1/ΣT``), or tokens against the length ``limit`` (``1/(N T_max)``).
        surrogate: ``(logprob, log_ratio, advantage, annotation, algorithm, reduce_segments)`` to
            ``(surrogate, detached ratio, token has no gradient)``, all ``[tokens]``.
        low, high: default clip range; ESPO derives its own (Eq. 8).
    """

    segments: str
    weights: str
    surrogate: Callable[..., tuple[Tensor, Tensor, Tensor]]
    low: float = 0.2
    high: float = 0.2


@dataclass(frozen=True)
class LossOutput:
    """What :func:`policy_loss` hands back.

    Attributes:
        loss: scalar, the sum over these tokens of ``-weight * surrogate``.
        ratio: ``[tokens]`` detached importance ratio of each token's segment.
        clipped_low, clipped_high: ``[tokens]`` bool, the ratio lies outside its bound on that side.
        no_gradient: ``[tokens]`` bool, the token's loss is constant in the policy.
        would_clip: objective's name to ``[tokens]`` bool, the ratio of GRPO or GSPO lies outside their default bounds.
    """

    loss: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    no_gradient: Tensor
    would_clip: dict[str, Tensor]


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    annotation,
    algorithm,
    *,
    reduce_segments: Reduce | None = None,
) -> LossOutput:
    """``-Σ_t w_t min(s_t A_t, clip(s_t, 1 - lo_t, 1 + hi_t) A_t)`` with the segment's ratio (Eq. 9, 10).

    Args:
        logprob: ``[tokens]`` float32, log π_θ(y_t) in nats at the sampling temperature, with gradient.
        old_logprob: ``[tokens]`` float32, the same of the policy before the update.
        advantage: ``[tokens]`` float32.
        annotation: :class:`~megatron_espo.algo.segments.Annotation` of the same tokens (a slice of it under context
            parallelism).
        algorithm: the ``algorithm`` section of the configuration.
        reduce_segments: sums a vector over context-parallel ranks; the only collective an objective ever needs.

    Raises:
        ValueError: log-probs that are NaN, infinite or positive; segments that do not cover the tokens.
    """
    _check(logprob, old_logprob, annotation)
    reduce_segments = reduce_segments or (lambda sums: sums)
    objective = OBJECTIVES[algorithm.objective]
    log_ratio = (logprob - old_logprob).detach()
    surrogate, ratio, no_gradient = objective.surrogate(
        logprob, log_ratio, advantage, annotation, algorithm, reduce_segments
    )
    # GMPO's bounds are on the token's log-ratio, everyone else's on the ratio.
    position = log_ratio if objective.surrogate is geometric_mean_surrogate else ratio - 1
    return LossOutput(
        loss=-(annotation.weight * surrogate).sum(),
        ratio=ratio,
        clipped_low=position < -annotation.low,
        clipped_high=position > annotation.high,
        no_gradient=no_gradient,
        would_clip=_would_clip(log_ratio, annotation, reduce_segments),
    )


def _check(logprob: Tensor, old_logprob: Tensor, annotation) -> None:
    for name, values in (("old_logprob", old_logprob), ("logprob", logprob.detach())):
        # Written so that NaN fails too.
        wrong = ~((values <= 1e-4) & (values > -torch.inf))
        if wrong.any():
            position = int(wrong.nonzero()[0])
            raise ValueError(
                f"{name}: expected log-probabilities (finite, at most 0), got {float(values[position])} at token {position}"
            )
    segment, size = annotation.segment, annotation.size
    if segment.shape != logprob.shape:
        raise ValueError(f"annotation: expected a segment for each of {len(logprob)} tokens, got {len(segment)}")
    found = torch.bincount(segment, minlength=len(size))
    # A context-parallel rank has some of a segment's tokens; nobody has more than there are.
    whole = int(size.sum()) == len(segment)
    if len(found) > len(size) or (found > size).any() or (whole and (found < size).any()):
        raise ValueError(
            f"annotation: segments do not cover the tokens: expected sizes {size.tolist()[:8]}, found {found.tolist()[:8]}"
        )


def _would_clip(log_ratio: Tensor, annotation, reduce_segments: Reduce) -> dict[str, Tensor]:
    """Tokens whose ratio under GRPO's (token) and GSPO's (response) rule lies outside their default bounds."""
    sequence = _mean(log_ratio, annotation.response, annotation.length, reduce_segments)
    positions = {"grpo": log_ratio.expm1(), "gspo": sequence.expm1()}
    return {name: (p < -OBJECTIVES[name].low) | (p > OBJECTIVES[name].high) for name, p in positions.items()}


def _mean(values: Tensor, index: Tensor, size: Tensor, reduce_segments: Reduce) -> Tensor:
    """Mean of ``values [tokens]`` over all tokens with the same ``index``, for each token ``[tokens]``."""
    sums = values.new_zeros(size.numel()).index_add_(0, index, values)
    return (reduce_segments(sums) / size)[index]


def _ratio(exponent: Tensor, logprob: Tensor) -> Tensor:
    """``sg[exp(exponent)] · exp(logp - sg[logp])``: the segment's value, the token's gradient."""
    value = exponent.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()
    return value * (logprob - logprob.detach()).exp()


def clipped_surrogate(logprob, log_ratio, advantage, annotation, algorithm, reduce_segments):
    """PPO's pessimistic minimum with the segment's length-normalised ratio (ESPO, GSPO, GRPO, Dr. GRPO, DAPO)."""
    exponent = _mean(log_ratio, annotation.segment, annotation.size, reduce_segments)
    if algorithm.ratio == "segment_times_token":  # Eq. 9 to the letter
        exponent = exponent + log_ratio
    ratio = _ratio(exponent, logprob)
    clipped = ratio.detach().clamp(1 - annotation.low, 1 + annotation.high) * advantage
    surrogate = ratio * advantage
    constant = clipped < surrogate
    surrogate = surrogate.where(~constant, clipped)
    if algorithm.dual_clip is not None:
        floor = algorithm.dual_clip * advantage
        below = (advantage < 0) & (surrogate < floor)
        surrogate, constant = surrogate.where(~below, floor), constant | below
    return surrogate, ratio.detach(), constant | (advantage == 0)


def detached_ratio_surrogate(logprob, log_ratio, advantage, annotation, algorithm, reduce_segments):
    """CISPO: the clipped ratio is a detached weight, so that every token keeps its gradient."""
    ratio = log_ratio.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()
    weight = ratio.clamp(1 - annotation.low, 1 + annotation.high)
    return weight * advantage * logprob, ratio, advantage == 0


def geometric_mean_surrogate(logprob, log_ratio, advantage, annotation, algorithm, reduce_segments):
    """GMPO: token log-ratios are clipped (pessimistically) before the response's geometric mean is taken."""
    clipped = log_ratio.clamp(-annotation.low, annotation.high)
    pessimistic = torch.where(advantage > 0, torch.minimum(log_ratio, clipped), torch.maximum(log_ratio, clipped))
    exponent = _mean(pessimistic, annotation.segment, annotation.size, reduce_segments)
    constant = pessimistic != log_ratio
    ratio = _ratio(exponent, logprob.where(~constant, logprob.detach()))
    return ratio * advantage, ratio.detach(), constant | (advantage == 0)


OBJECTIVES: dict[str, Objective] = {
    "espo": Objective("entropy", "segment", clipped_surrogate),
    "gspo": Objective("response", "response", clipped_surrogate, 3e-4, 4e-4),
    "grpo": Objective("token", "response", clipped_surrogate),
    "dr_grpo": Objective("token", "limit", clipped_surrogate),
    "dapo": Objective("token", "token", clipped_surrogate, 0.2, 0.28),
    "cispo": Objective("token", "token", detached_ratio_surrogate),
    "gmpo": Objective("response", "response", geometric_mean_surrogate, 0.4, 0.4),
}
