"""ESPO and its relatives as one formulation: segments, bounds, weights and a surrogate.

All tokens of a segment share one importance ratio; each token carries its own clip bounds and weight. A new objective is one
:class:`Objective` in :data:`OBJECTIVES`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Exponents are clamped before exp: one wild token must not turn a step into inf.
MAX_EXPONENT = 20.0


@dataclass(frozen=True)
class Objective:
    """How an objective differs from the others.

    Attributes:
        segments: what shares a ratio: ``entropy`` groups, the ``response``, or each ``token``.
        weights: what counts the same: every ``segment`` of a response (``1/(N K_i n_σ)``), ``response`` (``1/(N T_i)``), ``token``
            (``1/ΣT``), or tokens against the ``limit`` (``1/(N T_max)``).
        surrogate: ``(ratio inputs) -> (objective per token, token has no gradient)``.
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
    """

    loss: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    no_gradient: Tensor


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    annotation,
    algorithm,
    *,
    reduce_segments: Callable[[Tensor], Tensor] | None = None,
) -> LossOutput:
    """``-Σ_t w_t min(s_t A_t, clip(s_t, 1 - lo_t, 1 + hi_t) A_t)`` with the segment's ratio (Eq. 9, 10).

    Args:
        logprob: ``[tokens]`` float32, log π_θ(y_t) at the sampling temperature, with gradient.
        old_logprob: ``[tokens]`` float32, the same of the policy before the update.
        advantage: ``[tokens]`` float32.
        annotation: :class:`~megatron_espo.algo.segments.Annotation` of the same tokens (a slice of it under context parallelism).
        algorithm: the ``algorithm`` section of the configuration.
        reduce_segments: sums ``[segments]`` over context-parallel ranks; the only collective an objective ever needs.

    Raises:
        ValueError: old log-probs that are NaN or positive.
    """
    if not bool((old_logprob <= 1e-4).all()):
        raise ValueError(f"old_logprob: expected log-probabilities (at most 0, not NaN), got {float(old_logprob.max())}")
    objective = OBJECTIVES[algorithm.objective]
    surrogate, ratio, no_gradient = objective.surrogate(
        logprob, old_logprob, advantage, annotation, algorithm, reduce_segments or (lambda sums: sums)
    )
    loss = -(annotation.weight * surrogate).sum()
    log_domain = objective.surrogate is geometric_mean_surrogate
    position = (logprob - old_logprob).detach() if log_domain else ratio - 1
    return LossOutput(loss, ratio, position < -annotation.low, position > annotation.high, no_gradient)


def _segment_mean(values: Tensor, annotation, reduce_segments: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean of ``values [tokens]`` over each token's whole segment ``[tokens]``."""
    sums = values.new_zeros(annotation.size.numel()).index_add_(0, annotation.segment, values)
    return (reduce_segments(sums) / annotation.size)[annotation.segment]


def _ratio(exponent: Tensor, logprob: Tensor) -> Tensor:
    """``sg[exp(exponent)] · exp(logp - sg[logp])``: the segment's value, the token's gradient."""
    value = exponent.detach().clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()
    return value * (logprob - logprob.detach()).exp()


def clipped_surrogate(logprob, old_logprob, advantage, annotation, algorithm, reduce_segments):
    """PPO's pessimistic minimum with the segment's length-normalised ratio (ESPO, GSPO, GRPO, Dr. GRPO, DAPO)."""
    difference = (logprob - old_logprob).detach()
    exponent = _segment_mean(difference, annotation, reduce_segments)
    if algorithm.ratio == "segment_times_token":  # Eq. 9 to the letter
        exponent = exponent + difference
    ratio = _ratio(exponent, logprob)
    clipped = ratio.clamp(1 - annotation.low, 1 + annotation.high)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    no_gradient = (clipped * advantage < ratio * advantage) | (advantage == 0)
    if algorithm.dual_clip is not None:
        floor = algorithm.dual_clip * advantage
        below = (advantage < 0) & (surrogate < floor)
        surrogate, no_gradient = surrogate.where(~below, floor), no_gradient | below
    return surrogate, ratio.detach(), no_gradient.detach()


def detached_ratio_surrogate(logprob, old_logprob, advantage, annotation, algorithm, reduce_segments):
    """CISPO: the clipped ratio is a detached weight, so that every token keeps its gradient."""
    ratio = (logprob - old_logprob).detach().clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()
    weight = ratio.clamp(1 - annotation.low, 1 + annotation.high)
    return weight * advantage * logprob, ratio, advantage == 0


def geometric_mean_surrogate(logprob, old_logprob, advantage, annotation, algorithm, reduce_segments):
    """GMPO: token log-ratios are clipped (pessimistically) before the response's geometric mean is taken."""
    difference = (logprob - old_logprob).detach()
    clipped = difference.clamp(-annotation.low, annotation.high)
    pessimistic = torch.where(advantage > 0, torch.minimum(difference, clipped), torch.maximum(difference, clipped))
    exponent = _segment_mean(pessimistic, annotation, reduce_segments)
    constant = pessimistic != difference
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
