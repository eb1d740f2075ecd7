"""The base class of policy objectives, its inputs and its output.

An objective cuts responses into segments and gives each token a clip range and a weight. All tokens
of a segment share one importance ratio. The loss is ``-Σ_t w_t surrogate_t``; each class has its
own surrogate.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from megatron_espo.algo.segments import (
    Segments,
    SumOverRanks,
    TokenSegments,
    as_float,
    check_range,
    entropy_groups,
    response_index,
    sum_by_index,
)

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
    values synchronize a GPU.

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
        logprobs = "log-probabilities (finite, at most 0)"
        check_range("old_logprob", self.old_logprob, -math.inf, 1e-4, logprobs)
        check_range("logprob", self.logprob, -math.inf, 1e-4, logprobs)
        check_range("advantage", self.advantage, -math.inf, math.inf, "finite numbers")

    @cached_property
    def log_ratio(self) -> Tensor:
        """``[tokens]``, detached ``log π_θ - log π_old`` of each token."""
        return (self.logprob - self.old_logprob).detach()

    @cached_property
    def token_ratio(self) -> Tensor:
        """``[tokens]``, detached ``π_θ / π_old`` of each token."""
        return self.log_ratio.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()

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
        if not all(a < b for a, b in pairwise((0, *self.quantiles, 1))):
            got = f"got {self.quantiles}"
            raise ValueError(f"quantiles: expected ascending numbers inside (0, 1), {got}")
        check_name("segmentation", self.segmentation, Segmentation)
        check_name("aggregation", self.aggregation, Aggregation)
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
        check_range("entropy", entropy, -1e-3, highest + 1e-3, expected)
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
        return outside(output.ratio - 1, inputs.segments.low, inputs.segments.high)


def check_name(name: str, got: str, known: Any) -> None:
    """Raise ValueError unless ``got`` is one of the literals ``known``."""
    if got not in get_args(known):
        raise ValueError(f"{name}: expected one of {', '.join(get_args(known))}, got {got!r}")


def at_least(least: float, default: Any) -> Any:
    """A setting of an objective with a lower limit."""
    return field(default=default, metadata={"least": least})


def outside(values: Tensor, low: Any, high: Any) -> tuple[Tensor, Tensor]:
    """Whether values lie below ``-low`` or above ``high``, bool each."""
    return values < -low, values > high
