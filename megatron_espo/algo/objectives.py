"""ESPO and other policy objectives, one class each, with its settings."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_espo.algo.base import (
    Aggregation,
    LossInputs,
    LossOutput,
    Objective,
    RatioForm,
    at_least,
    check_name,
    importance_ratio,
    outside,
)
from megatron_espo.algo.segments import Segments, sum_by_index
from megatron_espo.errors import InputError
from megatron_espo.plugins import load_object


@dataclass(frozen=True, kw_only=True)
class _Clipped(Objective):
    """PPO's pessimistic minimum: ``min(s_t A_t, clip(s_t, 1 - low, 1 + high) A_t)`` (Eq. 9, 10).

    Attributes:
        dual_clip: bounds the surrogate of negative advantages to ``dual_clip · A``; ``None``: no
            bound.
    """

    dual_clip: float | None = at_least(1, None)

    def exponent(self, inputs: LossInputs) -> Tensor:
        """Logarithm of each token's ratio: the segment's length-normalised one."""
        return inputs.segment_mean(inputs.log_ratio)

    def loss(self, inputs: LossInputs) -> LossOutput:
        advantage, segments = inputs.advantage, inputs.segments
        ratio = importance_ratio(self.exponent(inputs), inputs.logprob)
        clipped = ratio.detach().clamp(1 - segments.low, 1 + segments.high) * advantage
        surrogate = ratio * advantage
        constant = clipped < surrogate
        surrogate = surrogate.where(~constant, clipped)
        if self.dual_clip is not None:
            floor = self.dual_clip * advantage
            below = (advantage < 0) & (surrogate < floor)
            surrogate, constant = surrogate.where(~below, floor), constant | below
        return inputs.output(surrogate, ratio, constant | (advantage == 0))


@dataclass(frozen=True, kw_only=True)
class _SegmentRatio(_Clipped):
    """Clipped objective of long segments.

    Attributes:
        ratio: the segment's ratio, or ``segment_times_token``: Eq. 9 to the letter.
    """

    ratio: RatioForm = "segment"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("ratio", self.ratio, RatioForm)

    def exponent(self, inputs: LossInputs) -> Tensor:
        exponent = super().exponent(inputs)
        return exponent + inputs.log_ratio if self.ratio == "segment_times_token" else exponent


@dataclass(frozen=True, kw_only=True)
class _FixedBounds(Objective):
    """The same clip range for all tokens.

    Attributes:
        clip_low, clip_high: clip range below and above a ratio of 1 (GMPO: below and above a
            log-ratio of 0).
    """

    clip_low: float = at_least(0, 0.2)
    clip_high: float = at_least(0, 0.2)

    def bounds(self, segments: Segments, vocab_size: int) -> tuple[Tensor, Tensor]:
        low, high = (torch.full_like(segments.entropy, x) for x in (self.clip_low, self.clip_high))
        return low, high


@dataclass(frozen=True, kw_only=True)
class ESPO(_SegmentRatio):
    """One ratio for each entropy group of a response; the clip range follows the group's entropy.

    Attributes:
        alpha: scale of the clip range (Eq. 8).
        clip_floor: smallest clip range of a group.
    """

    alpha: float = at_least(0, 0.02)
    clip_floor: float = at_least(0, 0.0)

    segmentation = "entropy"
    aggregation = "segment"

    def bounds(self, segments: Segments, vocab_size: int) -> tuple[Tensor, Tensor]:
        """``alpha / ln V`` times the group's mean entropy, on both sides (Eq. 8)."""
        size, segment = segments.size, segments.segment
        mean = sum_by_index(segments.entropy, segment, size.numel()) / size
        epsilon = (self.alpha / math.log(vocab_size) * mean).clamp(min=self.clip_floor)[segment]
        return epsilon, epsilon


@dataclass(frozen=True, kw_only=True)
class GSPO(_SegmentRatio, _FixedBounds):
    """One ratio for each response (arXiv 2507.18071)."""

    clip_low: float = at_least(0, 3e-4)
    clip_high: float = at_least(0, 4e-4)

    segmentation = "response"
    aggregation = "response"


@dataclass(frozen=True, kw_only=True)
class GRPO(_Clipped, _FixedBounds):
    """One ratio for each token; responses have equal weight (arXiv 2402.03300)."""

    segmentation = "token"
    aggregation: ClassVar[Aggregation] = "response"


@dataclass(frozen=True, kw_only=True)
class DrGRPO(GRPO):
    """GRPO whose tokens have the weight ``1/(N T_max)`` (arXiv 2503.20783).

    Attributes:
        max_response_tokens: ``T_max``, the generation limit.
    """

    max_response_tokens: int = field(metadata={"least": 1})

    def token_counts(self, segments: Segments, num_responses: int, num_tokens: int) -> Tensor:
        return torch.full_like(segments.segment, num_responses * self.max_response_tokens)


@dataclass(frozen=True, kw_only=True)
class DAPO(GRPO):
    """GRPO whose tokens have equal weight; a wider clip range above 1 (arXiv 2503.14476)."""

    clip_high: float = at_least(0, 0.28)

    aggregation = "token"


@dataclass(frozen=True, kw_only=True)
class CEGPPO(_FixedBounds):
    """GRPO whose clipped tokens keep a bounded gradient (CE-GPPO, arXiv 2509.20712).

    Where GRPO's surrogate is constant, the factor of ``∇ log π_θ`` is ``beta (1 ± clip) A``. Tokens
    have equal weight.

    Attributes:
        beta_low: of tokens with ``A < 0`` below the clip range; a larger one raises the entropy.
        beta_high: of tokens with ``A > 0`` above the clip range; a larger one lowers the entropy.
    """

    clip_high: float = at_least(0, 0.28)
    beta_low: float = at_least(0, 0.75)
    beta_high: float = at_least(0, 1.0)

    segmentation = "token"
    aggregation = "token"

    def loss(self, inputs: LossInputs) -> LossOutput:
        advantage, segments, ratio = inputs.advantage, inputs.segments, inputs.token_ratio
        below, above = outside(ratio - 1, segments.low, segments.high)
        factor = torch.where(above & (advantage > 0), self.beta_high * (1 + segments.high), ratio)
        factor = torch.where(below & (advantage < 0), self.beta_low * (1 - segments.low), factor)
        surrogate = factor * advantage * importance_ratio(torch.zeros_like(ratio), inputs.logprob)
        return inputs.output(surrogate, ratio, advantage == 0)


@dataclass(frozen=True, kw_only=True)
class DPPO(_FixedBounds):
    """Tokens whose probability moved too far are constant (DPPO-Binary-TV, arXiv 2602.04879).

    The clip range limits ``D_t = π_θ - π_old`` of the sampled token, not the ratio: the gradient is
    ``r_t A_t ∇ log π_θ`` unless ``D_t`` has the sign of ``A_t`` and lies outside it. Tokens have
    equal weight.

    Attributes:
        max_ratio: the ratio is clamped to it, as a factor of the gradient.
    """

    max_ratio: float = at_least(1, 20.0)

    segmentation = "token"
    aggregation = "token"

    def loss(self, inputs: LossInputs) -> LossOutput:
        advantage, ratio = inputs.advantage, inputs.token_ratio
        below, above = self.clipped(inputs, None)
        constant = (above & (advantage > 0)) | (below & (advantage < 0)) | (advantage == 0)
        factor = (ratio.clamp(max=self.max_ratio) * advantage).masked_fill(constant, 0.0)
        return inputs.output(factor * inputs.logprob, ratio, constant)

    def clipped(self, inputs: LossInputs, output: LossOutput | None) -> tuple[Tensor, Tensor]:
        change = inputs.logprob.detach().exp() - inputs.old_logprob.exp()
        return outside(change, inputs.segments.low, inputs.segments.high)


@dataclass(frozen=True, kw_only=True)
class CISPO(_FixedBounds):
    """``sg[clip(r_t)] A_t log π_θ(y_t)``: every token has a gradient (arXiv 2506.13585)."""

    segmentation = "token"
    aggregation = "token"

    def loss(self, inputs: LossInputs) -> LossOutput:
        advantage, segments, ratio = inputs.advantage, inputs.segments, inputs.token_ratio
        factor = ratio.clamp(1 - segments.low, 1 + segments.high)
        return inputs.output(factor * advantage * inputs.logprob, ratio, advantage == 0)


@dataclass(frozen=True, kw_only=True)
class SAPO(Objective):
    """A sigmoid gate instead of clipping: ``4/τ sigmoid(τ (r_t - 1)) A_t`` (arXiv 2511.20347).

    Attributes:
        tau_pos: temperature ``τ`` of tokens with ``A > 0``.
        tau_neg: the same of the others; larger, so that their gradients vanish sooner.
    """

    tau_pos: float = at_least(0.001, 1.0)
    tau_neg: float = at_least(0.001, 1.05)

    segmentation = "token"
    aggregation = "response"

    def loss(self, inputs: LossInputs) -> LossOutput:
        advantage, ratio, logprob = inputs.advantage, inputs.token_ratio, inputs.logprob
        tau = torch.full_like(ratio, self.tau_neg).masked_fill(advantage > 0, self.tau_pos)
        gate = (tau * (ratio - 1)).sigmoid()
        # sigmoid(-x) is 1 - sigmoid(x) without the rounding of numbers near 1.
        slope = 4 * gate * (tau * (1 - ratio)).sigmoid() * ratio
        surrogate = advantage * (4 / tau * gate + slope * (logprob - logprob.detach()))
        return inputs.output(surrogate, ratio, advantage == 0)


@dataclass(frozen=True, kw_only=True)
class GMPO(_FixedBounds):
    """Token log-ratios are clipped, then averaged over the response (arXiv 2507.20673)."""

    clip_low: float = at_least(0, 0.4)
    clip_high: float = at_least(0, 0.4)

    segmentation = "response"
    aggregation = "response"

    def loss(self, inputs: LossInputs) -> LossOutput:
        log_ratio, advantage, logprob = inputs.log_ratio, inputs.advantage, inputs.logprob
        clipped = log_ratio.clamp(-inputs.segments.low, inputs.segments.high)
        pessimistic = torch.where(
            advantage > 0, torch.minimum(log_ratio, clipped), torch.maximum(log_ratio, clipped)
        )
        constant = pessimistic != log_ratio
        free = logprob.where(~constant, logprob.detach())
        ratio = importance_ratio(inputs.segment_mean(pessimistic), free)
        return inputs.output(ratio * advantage, ratio, constant | (advantage == 0))

    def clipped(self, inputs: LossInputs, output: LossOutput) -> tuple[Tensor, Tensor]:
        return outside(inputs.log_ratio, inputs.segments.low, inputs.segments.high)


def would_clip(inputs: LossInputs) -> dict[str, Tensor]:
    """Whether a ratio lies outside the default bounds of GRPO or GSPO, ``[tokens]`` bool each.

    For metrics. One sum over context-parallel ranks.
    """
    token, response = inputs.log_ratio.expm1(), inputs.response_mean(inputs.log_ratio).expm1()
    return {
        "grpo": torch.logical_or(*outside(token, GRPO.clip_low, GRPO.clip_high)),
        "gspo": torch.logical_or(*outside(response, GSPO.clip_low, GSPO.clip_high)),
    }


OBJECTIVES: dict[str, type[Objective]] = {
    "espo": ESPO,
    "gspo": GSPO,
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "dapo": DAPO,
    "cispo": CISPO,
    "gmpo": GMPO,
    "ce_gppo": CEGPPO,
    "dppo": DPPO,
    "sapo": SAPO,
}


def load_objective(algorithm: Any, *, max_response_tokens: int | None = None) -> Objective:
    """The objective of the ``algorithm`` section of a configuration.

    A built-in objective takes its settings from the keys of the section, and those that are not
    keys from ``objective_args``. A ``module:Class`` takes all from ``objective_args``. Both get
    ``quantiles``, and ``max_response_tokens`` if they have that field.

    Args:
        algorithm: :class:`megatron_espo.config.Algorithm`.
        max_response_tokens: the generation limit.

    Raises:
        InputError: an unknown objective, or settings that its class does not have.
    """
    name = algorithm.objective
    shared = {"quantiles": algorithm.quantiles, "max_response_tokens": max_response_tokens}
    section: Mapping[str, Any] = vars(algorithm)
    args = algorithm.objective_args
    cls = OBJECTIVES.get(name)
    if cls is None:
        cls, section = load_object("algorithm.objective", name), {}
        if not (isinstance(cls, type) and issubclass(cls, Objective)):
            raise InputError(f"algorithm.objective: expected a subclass of Objective, got {name}")
    known = {field.name for field in fields(cls)} - shared.keys() - section.keys()
    if unknown := sorted(args.keys() - known):
        raise InputError(
            f"algorithm.objective_args: expected settings of {name} "
            f"({', '.join(sorted(known)) or 'it has none'}), got {', '.join(unknown)}"
        )
    given = shared | dict(section) | args
    settings = {key: value for key, value in given.items() if value is not None}
    try:
        return cls(**{f.name: settings[f.name] for f in fields(cls) if f.name in settings})
    except (TypeError, ValueError) as error:
        raise InputError(f"algorithm.objective_args: {name}: {error}") from None
