"""ESPO and other policy objectives, one class each, with its settings.

An objective cuts responses into segments and gives each token a clip range and a weight. All tokens
of a segment share one importance ratio. The loss is ``-Σ_t w_t surrogate_t``; each class has its
own surrogate.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from megatron_espo.algo.segments import (
    Segments,
    SumOverRanks,
    TokenSegments,
    as_float,
    check_quantiles,
    check_ranges,
    entropy_groups,
    response_index,
    sum_by_index,
)
from megatron_espo.errors import InputError
from megatron_espo.plugins import load_object

# Exponents are clamped before exp, so that one extreme token does not make the loss infinite.
MAX_EXPONENT = 20.0

Segmentation = Literal["entropy", "response", "token"]
Aggregation = Literal["segment", "response", "token"]
RatioForm = Literal["segment", "segment_times_token"]


@dataclass(frozen=True, eq=False)
class LossOutput:
    """What an objective computes from :class:`LossInputs`.

    Attributes:
        loss: scalar with gradient, the sum of ``-weight * surrogate`` over these tokens.
        ratio: ``[tokens]``, detached importance ratio of each token's segment.
        no_gradient: ``[tokens]`` bool, the token's surrogate is constant in the policy.
    """

    loss: Tensor
    ratio: Tensor
    no_gradient: Tensor


@dataclass(frozen=True, eq=False)
class LossInputs:
    """One micro-batch as an objective takes it; under context parallelism, this rank's tokens.

    Values of another dtype are converted to float32 (float64 stays float64). The checks of the
    values synchronize a GPU once.

    Attributes:
        logprob: ``[tokens]`` float32 with gradient, log π_θ(y_t) at the sampling temperature
            (nats).
        old_logprob: ``[tokens]`` float32, the same of the policy before the update.
        advantage: ``[tokens]`` float32.
        segments: of the same tokens.
        entropy: ``[tokens]`` float32, entropy of π_θ (nats); with gradient if
            :attr:`Objective.uses_entropy`.
        sum_over_ranks: sums a vector over context-parallel ranks, the only collective of an
            objective.

    Raises:
        ValueError: a tensor whose shape or device is not that of ``segments``, log-probs that are
            NaN, infinite or positive, or an advantage that is NaN or infinite.
    """

    logprob: Tensor
    old_logprob: Tensor
    advantage: Tensor
    segments: TokenSegments
    entropy: Tensor | None = None
    sum_over_ranks: SumOverRanks = field(default=lambda sums: sums)

    def __post_init__(self) -> None:
        for name in ("logprob", "old_logprob", "advantage", "entropy"):
            if (values := getattr(self, name)) is not None:
                values = as_float(name, values, self.segments.segment)
                object.__setattr__(self, name, values)

        def checked(name: str, high: float, expected: str):
            values = getattr(self, name).detach()
            least, most = torch.finfo(values.dtype).min, torch.finfo(values.dtype).max
            return name, values, least, min(most, high), expected

        logprobs = "log-probabilities (finite, at most 0)"
        check_ranges(
            checked("old_logprob", 1e-4, logprobs),
            checked("logprob", 1e-4, logprobs),
            checked("advantage", math.inf, "finite numbers"),
        )

    @cached_property
    def log_ratio(self) -> Tensor:
        """``[tokens]``, detached ``log π_θ - log π_old`` of each token."""
        return (self.logprob - self.old_logprob).detach()

    def segment_mean(self, values: Tensor) -> Tensor:
        """Mean of ``values [tokens]`` over each token's whole segment, ``[tokens]``."""
        return self._mean(values, self.segments.segment, self.segments.size)

    def response_mean(self, values: Tensor) -> Tensor:
        """Mean of ``values [tokens]`` over each token's whole response, ``[tokens]``."""
        return self._mean(values, self.segments.response, self.segments.length)

    def _mean(self, values: Tensor, index: Tensor, size: Tensor) -> Tensor:
        sums = self.sum_over_ranks(sum_by_index(values, index, size.numel()))
        return (sums / size)[index]

    def output(self, surrogate: Tensor, ratio: Tensor, no_gradient: Tensor) -> LossOutput:
        """The loss ``-Σ_t w_t surrogate_t``, with ratio and mask; each ``[tokens]``."""
        return LossOutput(-(self.segments.weight * surrogate).sum(), ratio.detach(), no_gradient)


def importance_ratio(exponent: Tensor, logprob: Tensor) -> Tensor:
    """``sg[exp(exponent)] · exp(logp - sg[logp])``: each token has its own gradient (Eq. 9)."""
    value = exponent.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()
    return value * (logprob - logprob.detach()).exp()


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """A policy objective. A subclass is a frozen dataclass whose fields are its settings.

    Attributes:
        quantiles: entropy quantiles inside a response at which its tokens are cut into groups;
            every objective reports its metrics by group.
        segmentation: tokens that share a ratio: an ``entropy`` group, the ``response``, or each
            ``token`` alone.
        aggregation: what has equal weight: each ``segment`` of a response (``w_t = 1/(N K_i
            n_σ)``), each ``response`` (``1/(N T_i)``), or each ``token`` (``1/ΣT``).
        uses_entropy: the loss differentiates :attr:`LossInputs.entropy`.

    Raises:
        ValueError: a setting outside its range, or an unknown name.
    """

    quantiles: tuple[float, ...] = (0.8,)

    segmentation: ClassVar[Segmentation]
    aggregation: ClassVar[Aggregation]
    uses_entropy: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_quantiles(self.quantiles)
        _check_name("segmentation", self.segmentation, Segmentation)
        _check_name("aggregation", self.aggregation, Aggregation)
        for setting in fields(self):
            least, got = setting.metadata.get("least"), getattr(self, setting.name)
            if None not in (least, got) and not least <= got < math.inf:
                raise ValueError(f"{setting.name}: expected a number from {least} on, got {got}")

    @abstractmethod
    def loss(self, inputs: LossInputs) -> LossOutput:
        """Loss of one micro-batch; :meth:`LossInputs.output` sums a surrogate."""

    def bounds(self, segments: Segments, vocab_size: int) -> tuple[Tensor, Tensor]:
        """Clip range ``(low, high)``, each ``[tokens]``; infinite unless a subclass clips."""
        unbounded = torch.full_like(segments.entropy, torch.inf)
        return unbounded, unbounded

    def token_counts(self, segments: Segments, num_responses: int, num_tokens: int) -> Tensor:
        """Reciprocal weights ``[tokens]`` int64; arguments as in :meth:`segment_tokens`."""
        segment, response = segments.segment, segments.response
        if self.aggregation == "token":
            return torch.full_like(response, num_tokens)
        if self.aggregation == "response":
            return num_responses * segments.length[response]
        first = torch.zeros_like(segments.size).index_put_((segment,), response)
        segments_of = torch.bincount(first, minlength=segments.length.numel())
        return num_responses * segments_of[response] * segments.size[segment]

    def segment_tokens(
        self,
        entropy: Tensor,
        lengths: Tensor,
        *,
        vocab_size: int,
        num_responses: int,
        num_tokens: int,
    ) -> TokenSegments:
        """Cut whole responses into segments, with bounds and weights (Eq. 7, 8).

        Zero collectives. The result does not depend on which other responses are in the call.

        Args:
            entropy: ``[tokens]`` float32, entropy of the old policy over the true vocabulary
                (nats); another dtype is converted.
            lengths: ``[responses]`` int64, all at least 1.
            vocab_size: the true vocabulary; its logarithm is the largest possible entropy.
            num_responses: ``N`` of the optimizer step's whole batch, masked responses included.
            num_tokens: response tokens ``ΣT`` of the optimizer step's whole batch.

        Raises:
            ValueError: entropies outside ``[0, ln V]``, lengths whose sum is not the number of
                tokens, or totals of the step that are below those of this call.
        """
        group = entropy_groups(entropy, lengths, self.quantiles)
        tokens, response = len(entropy), response_index(lengths)
        for name, value, least in (
            ("vocab_size", vocab_size, 2),
            ("num_responses", num_responses, min(tokens, 1)),
            ("num_tokens", num_tokens, tokens),
        ):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        entropy = as_float("entropy", entropy, response)
        highest = math.log(vocab_size)
        expected = f"values in [0, ln {vocab_size} = {highest:.4f}] nats (true vocabulary)"
        check_ranges(("entropy", entropy, -1e-3, highest + 1e-3, expected))
        key = {
            "entropy": response * (len(self.quantiles) + 1) + group,
            "response": response,
            "token": torch.arange(entropy.numel(), device=entropy.device),
        }[self.segmentation]
        _, segment, size = torch.unique(key, return_inverse=True, return_counts=True)
        cut = Segments(segment, size, response, lengths, group, entropy)
        low, high = self.bounds(cut, vocab_size)
        weight = self.token_counts(cut, num_responses, num_tokens).to(entropy).reciprocal()
        return TokenSegments(**vars(cut), low=low, high=high, weight=weight)

    def clipped(self, inputs: LossInputs, output: LossOutput) -> tuple[Tensor, Tensor]:
        """Whether a ratio lies below or above its range, ``[tokens]`` bool each; for metrics."""
        return _outside(output.ratio - 1, inputs.segments.low, inputs.segments.high)


def _check_name(name: str, got: str, known: Any) -> None:
    if got not in get_args(known):
        raise ValueError(f"{name}: expected one of {', '.join(get_args(known))}, got {got!r}")


def _at_least(least: float, default: Any) -> Any:
    """A setting with a lower limit."""
    return field(default=default, metadata={"least": least})


def _outside(value, low, high) -> tuple[Tensor, Tensor]:
    return value < -low, value > high


@dataclass(frozen=True, kw_only=True)
class _Clipped(Objective):
    """PPO's pessimistic minimum: ``min(s_t A_t, clip(s_t, 1 - low, 1 + high) A_t)`` (Eq. 9, 10).

    Attributes:
        dual_clip: bounds the surrogate of negative advantages to ``dual_clip · A``; ``None``: no
            bound.
    """

    dual_clip: float | None = _at_least(1, None)

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
        _check_name("ratio", self.ratio, RatioForm)

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

    clip_low: float = _at_least(0, 0.2)
    clip_high: float = _at_least(0, 0.2)

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

    alpha: float = _at_least(0, 0.02)
    clip_floor: float = _at_least(0, 0.0)

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
    """One ratio for each response."""

    clip_low: float = _at_least(0, 3e-4)
    clip_high: float = _at_least(0, 4e-4)

    segmentation = "response"
    aggregation = "response"


@dataclass(frozen=True, kw_only=True)
class GRPO(_Clipped, _FixedBounds):
    """One ratio for each token; responses have equal weight."""

    segmentation = "token"
    aggregation: ClassVar[Aggregation] = "response"


@dataclass(frozen=True, kw_only=True)
class DrGRPO(GRPO):
    """GRPO whose tokens have the weight ``1/(N T_max)``.

    Attributes:
        max_response_tokens: ``T_max``, the generation limit.
    """

    max_response_tokens: int = field(metadata={"least": 1})

    def token_counts(self, segments: Segments, num_responses: int, num_tokens: int) -> Tensor:
        return torch.full_like(segments.segment, num_responses * self.max_response_tokens)


@dataclass(frozen=True, kw_only=True)
class DAPO(GRPO):
    """GRPO whose tokens have equal weight, with a wider clip range above 1."""

    clip_high: float = _at_least(0, 0.28)

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

    clip_high: float = 0.28
    beta_low: float = 0.75
    beta_high: float = 1.0

    segmentation = "token"
    aggregation = "token"

    def loss(self, inputs: LossInputs) -> LossOutput:
        advantage, segments = inputs.advantage, inputs.segments
        ratio = inputs.log_ratio.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()
        below, above = _outside(ratio - 1, segments.low, segments.high)
        factor = torch.where(above & (advantage > 0), self.beta_high * (1 + segments.high), ratio)
        factor = torch.where(below & (advantage < 0), self.beta_low * (1 - segments.low), factor)
        surrogate = factor * advantage * importance_ratio(torch.zeros_like(ratio), inputs.logprob)
        return inputs.output(surrogate, ratio, advantage == 0)


@dataclass(frozen=True, kw_only=True)
class DPPO(_FixedBounds):
    """Tokens whose probability moved too far are constant (DPPO-Binary-TV, arXiv 2602.04879).

    The clip range limits ``π_θ - π_old`` of the sampled token, not the ratio. Tokens have equal
    weight.

    Attributes:
        max_ratio: the ratio is clamped to it, as a factor of the gradient.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    max_ratio: float = 20.0

    segmentation = "token"
    aggregation = "token"

    def loss(self, inputs: LossInputs) -> LossOutput:
        advantage = inputs.advantage
        ratio = inputs.log_ratio.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()
        below, above = self.clipped(inputs, None)
        constant = (above & (advantage > 0)) | (below & (advantage < 0)) | (advantage == 0)
        factor = (ratio.clamp(max=self.max_ratio) * advantage).masked_fill(constant, 0.0)
        return inputs.output(factor * inputs.logprob, ratio, constant)

    def clipped(self, inputs: LossInputs, output: LossOutput | None) -> tuple[Tensor, Tensor]:
        change = inputs.logprob.detach().exp() - inputs.old_logprob.exp()
        return _outside(change, inputs.segments.low, inputs.segments.high)


@dataclass(frozen=True, kw_only=True)
class CISPO(_FixedBounds):
    """The clipped ratio is a detached factor of the log-prob: every token has a gradient."""

    segmentation = "token"
    aggregation = "token"

    def loss(self, inputs: LossInputs) -> LossOutput:
        advantage, segments = inputs.advantage, inputs.segments
        ratio = inputs.log_ratio.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()
        factor = ratio.clamp(1 - segments.low, 1 + segments.high)
        return inputs.output(factor * advantage * inputs.logprob, ratio, advantage == 0)


@dataclass(frozen=True, kw_only=True)
class GMPO(_FixedBounds):
    """Token log-ratios are clipped (pessimistically) before the response's geometric mean."""

    clip_low: float = _at_least(0, 0.4)
    clip_high: float = _at_least(0, 0.4)

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
        return _outside(inputs.log_ratio, inputs.segments.low, inputs.segments.high)


def would_clip(inputs: LossInputs) -> dict[str, Tensor]:
    """Whether a ratio lies outside the default bounds of GRPO or GSPO, ``[tokens]`` bool each.

    For metrics. One sum over context-parallel ranks.
    """
    log_ratio = inputs.log_ratio
    rules: dict[str, tuple[type[_FixedBounds], Tensor]] = {
        "grpo": (GRPO, log_ratio),
        "gspo": (GSPO, inputs.response_mean(log_ratio)),
    }
    return {
        name: torch.logical_or(*_outside(exponent.expm1(), cls.clip_low, cls.clip_high))
        for name, (cls, exponent) in rules.items()
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
