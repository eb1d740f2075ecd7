"""Training data: a response with its advantage, a micro-batch, and the sizes of a whole step."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from megatron_espo.types import SamplingMask, as_vector

Values = TypeVar("Values", np.ndarray, SamplingMask)


@dataclass(frozen=True, eq=False)
class TrainSequence:
    """One prompt and response with its advantage.

    ``P`` and ``T`` are the lengths of prompt and response. Only *trained* tokens (``loss_mask``
    True) have a loss, and only they count in lengths, groups and denominators. The other response
    tokens are context.

    Attributes:
        prompt_ids: ``[P]`` int32, at least one: the hidden state of the last one predicts the first
            response token.
        response_ids: ``[T]`` int32, at least one.
        rollout_logprobs: ``[T]`` float32, the engine's log-probs of ``response_ids`` (nats).
        advantage: of every trained token.
        loss_mask: ``[T]`` bool, at least one True; ``None``: all True.
        masked: the sequence has no gradient (a truncated response, for example), but counts in the
            denominators.
        old_logprobs, old_entropies: ``[T]`` float32, of the old policy (nats), if they are known;
            ``None``: from a scoring pass, or the policy itself in the first step on these rollouts.
        logged_sample: index of the response among those whose entropies are logged for each token;
            ``None``: it is not logged.
        routed_experts: ``[P + T - 1, layers with experts, experts a token]`` integers: the engine's
            choice of experts for every token except the last, which predicts nothing. ``None``: the
            trainer's routers choose.
        sampling_mask: of ``response_ids``. Log-probs and entropies are those of the distribution
            over the kept ids. ``None``: over the whole vocabulary.
        zero_variance: 1 or -1 where the entropies shape the advantage, see
            :func:`megatron_espo.algo.entropy_shape`.
        num_trained: response tokens with a loss.

    Raises:
        ValueError: an empty prompt or response, no trained token, values that do not match the
            response, an advantage that is not a finite number, a rollout log-prob of a trained
            token that is not, or a trained token that is not among the ids kept for it.
    """

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    rollout_logprobs: np.ndarray
    advantage: float
    loss_mask: np.ndarray | None = None
    masked: bool = False
    old_logprobs: np.ndarray | None = None
    old_entropies: np.ndarray | None = None
    logged_sample: int | None = None
    routed_experts: np.ndarray | None = field(default=None, repr=False)
    sampling_mask: SamplingMask | None = field(default=None, repr=False)
    zero_variance: int = 0
    num_trained: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        prompt, response = len(self.prompt_ids), len(self.response_ids)
        if not prompt or not response:
            raise ValueError(
                "TrainSequence: expected a prompt and a response of at least one token, "
                f"got {prompt} prompt tokens and {response} response tokens"
            )
        for name, dtype, length in (
            ("prompt_ids", np.int32, prompt),
            ("response_ids", np.int32, response),
            ("rollout_logprobs", np.float32, response),
            ("loss_mask", np.bool_, response),
            ("old_logprobs", np.float32, response),
            ("old_entropies", np.float32, response),
        ):
            values = getattr(self, name)
            if values is not None:
                values = as_vector(f"TrainSequence.{name}", values, dtype, length)
                object.__setattr__(self, name, values)
        mask = self.loss_mask
        trained = response if mask is None else int(np.count_nonzero(mask))
        object.__setattr__(self, "num_trained", trained)
        if not trained:
            raise ValueError(
                "TrainSequence.loss_mask: expected at least one trained token, "
                f"got a mask of {response} False"
            )
        # Here on the host: the same check of a device's tensors would wait for the device.
        if np.ndim(self.advantage) or not math.isfinite(self.advantage):
            expected = f"expected a finite number, got {self.advantage}"
            raise ValueError(f"TrainSequence.advantage: {expected}")
        if not np.isfinite(self.trained(self.rollout_logprobs)).all():
            raise ValueError("TrainSequence.rollout_logprobs: expected finite numbers, got others")
        if self.sampling_mask is not None:
            as_vector("TrainSequence.sampling_mask", self.sampling_mask.counts, np.int32, response)
            kept = self.trained(self.sampling_mask)
            own = self.trained(self.response_ids).repeat(kept.counts)
            if np.count_nonzero(kept.ids == own) != trained:
                expected = "expected every trained token among the ids kept for it"
                raise ValueError(f"TrainSequence.sampling_mask: {expected}")
        experts = self.routed_experts
        if experts is not None and (experts.ndim != 3 or len(experts) != prompt + response - 1):
            raise ValueError(
                f"TrainSequence: expected routed_experts [{prompt + response - 1}, layers, top_k], "
                f"one row for each token except the last, got {list(experts.shape)}"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model: ``P + T``."""
        return len(self.prompt_ids) + len(self.response_ids)

    def trained(self, values: Values) -> Values:
        """The entries of ``values [T]`` at the trained tokens; ``values`` itself if all are."""
        is_whole = self.loss_mask is None or self.num_trained == len(values)
        return values if is_whole else values[self.loss_mask]


@dataclass(frozen=True)
class BatchTotals:
    """Sizes of one optimizer step's batch over all data-parallel ranks: the denominators of the
    loss.

    ``num_responses`` and ``num_response_tokens`` count every sequence and its trained tokens, also
    those of sequences without gradient. ``num_tokens`` counts all tokens that go through the model;
    Megatron's schedule divides gradients by it.
    """

    num_responses: int
    num_response_tokens: int
    num_tokens: int


# Narrow on the host, because a step has many tokens, and int64 where torch computes with them.
_INDICES = {"tokens", "position_ids", "logit_positions", "targets"}


@dataclass(frozen=True)
class MicroBatch:
    """Sequences in the form that the model and the loss take: concatenated (THD), or in padded
    rows.

    ``trained_tokens`` counts response tokens with a loss. Other tokens occur in ``tokens`` and
    ``position_ids`` only. Under context parallelism ``total`` and ``trained_tokens`` count this
    rank's tokens; ``cu_seqlens``, ``max_seqlen`` and ``lengths`` describe the whole micro-batch.

    Token ids, positions and rows are int32 on the host, and int64 after :meth:`to`.

    Attributes:
        tokens: token ids, ``[1, total]`` packed or ``[sequences, longest]`` padded.
        position_ids: of the same shape, from 0 in each sequence.
        cu_seqlens: ``[sequences + 1]`` int32 boundaries; ``None`` in a padded micro-batch.
        max_seqlen: tokens of the longest sequence.
        logit_positions: ``[trained_tokens]``, row of the model's hidden states (``[total,
            hidden]``, or ``[longest, sequences, hidden]`` flattened) that predicts each trained
            token.
        targets: ``[trained_tokens]``, the trained tokens.
        lengths: ``[sequences]`` int64, trained tokens of each sequence.
        advantage, rollout_logprob: ``[trained_tokens]`` float32.
        totals: sizes of the whole optimizer step.
        num_tokens: tokens without padding; under context parallelism the first rank has the number
            and the others 0.
        local_tokens: ``[trained_tokens]`` int64, indices of this rank's trained tokens in the whole
            micro-batch; ``None``: all.
        prefix_groups: with shared prompts, for each sequence of ``cu_seqlens`` the length of its
            shared prefix and the lengths of the suffixes after it. Each suffix attends to the
            prefix and to itself. ``None``: plain sequences.
        old_logprob, old_entropy: ``[trained_tokens]`` float32, of the old policy (nats), from a
            scoring pass; ``None``: the policy itself is the old policy, because the step is the
            first on its rollouts.
        reference_logprob: ``[trained_tokens]`` float32, of the frozen reference (nats); ``None``
            without a KL penalty.
        logged_sample: for each response its :attr:`TrainSequence.logged_sample`.
        routed_experts: ``[rows, layers with experts, experts a token]`` int16, in the order of the
            rows of the hidden states: the engine's choices, or -1 where the router chooses
            (padding, last tokens). ``None``: the router chooses everywhere.
        sampling_mask: ``[2, kept ids]`` int32: index in ``targets`` (ascending) and token id of
            each id that the sampler kept; ``None``: it kept the whole vocabulary.
        zero_variance: ``[sequences]`` int8, :attr:`TrainSequence.zero_variance`; ``None``: all 0.
    """

    tokens: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor | None
    max_seqlen: int
    logit_positions: Tensor
    targets: Tensor
    lengths: Tensor
    advantage: Tensor
    rollout_logprob: Tensor
    totals: BatchTotals
    num_tokens: int
    local_tokens: Tensor | None = None
    prefix_groups: tuple[tuple[int, ...], ...] | None = None
    old_logprob: Tensor | None = None
    old_entropy: Tensor | None = None
    reference_logprob: Tensor | None = None
    logged_sample: tuple[int | None, ...] = ()
    routed_experts: Tensor | None = None
    sampling_mask: Tensor | None = None
    zero_variance: Tensor | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch with its tensors on ``device``, as the model and the loss take them:
        token ids, positions and rows are int64.
        """
        tensors: dict[str, Any] = {
            name: x.to(device).long() if name in _INDICES else x.to(device)
            for name, x in vars(self).items()
            if isinstance(x, Tensor)
        }
        return replace(self, **tensors)
