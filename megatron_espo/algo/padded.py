"""Objectives on padded ``[batch, time]`` tensors, for trainers that do not pack their batches."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from megatron_espo.algo.base import LossInputs, LossOutput, Objective
from megatron_espo.algo.segments import as_float, check_range


def padded_loss(
    objective: Objective,
    logprob: Tensor,
    old_logprob: Tensor,
    entropy: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    vocab_size: int,
    num_responses: int | None = None,
    num_tokens: int | None = None,
    correction: Tensor | None = None,
) -> LossOutput:
    """Loss of whole responses, one per row, at most one micro-batch of an optimizer step.

    The sum of the losses of all micro-batches and ranks is the loss of the step. Divide nothing by
    the number of micro-batches; multiply by the number of ranks if the trainer averages their
    gradients. Zero collectives.

    Args:
        objective: for example ``ESPO()``.
        logprob: ``[batch, time]`` with gradient, log-probs of the sampled tokens under the trained
            policy, at the sampling temperature (nats).
        old_logprob: ``[batch, time]``, the same under the policy before the update.
        entropy: ``[batch, time]``, entropies of the OLD policy over the vocabulary (nats), at the
            same temperature. ESPO cuts segments at their quantiles, so a later forward pass of
            the trained policy is not a substitute.
        advantage: ``[batch]``, ``[batch, 1]`` or ``[batch, time]``.
        mask: ``[batch, time]`` bool or 0/1, the tokens that are trained. They may have gaps. Where
            it is 0, no value of any tensor is read. A row may be all 0.
        vocab_size: the true vocabulary; its logarithm is the largest possible entropy.
        num_responses: responses of the optimizer step, rows without trained tokens included.
            Default: ``batch``, which is right if the step has one micro-batch on one rank.
        num_tokens: trained tokens of the optimizer step. Default: those of ``mask``.
        correction: factor of each token's surrogate, for example truncated importance sampling
            against the rollout engine; shapes as ``advantage``. Default: 1.

    Returns:
        The loss, a scalar in float32 (float64 for float64 log-probs). ``ratio`` and
        ``no_gradient`` are ``[batch, time]``, 1 and True where the mask is 0.

    Raises:
        ValueError: a mask that is not 0/1 ``[batch, time]``, a tensor whose shape or device does
            not fit it, and what :class:`LossInputs` and :meth:`Objective.segment_tokens` raise.
    """
    kept, dtype = mask.bool(), torch.promote_types(logprob.dtype, torch.float32)
    if mask.dim() != 2 or (mask != kept).any():
        got = f"{list(mask.shape)} with values {mask.unique().tolist()[:4]}"
        raise ValueError(f"mask: expected 0 and 1, [batch, time], got {got}")

    def packed(name: str, values: Tensor, rows: bool = False) -> Tensor:
        if rows and values.shape == kept.shape[:1]:
            values = values.unsqueeze(1)
        if rows and values.shape == (len(kept), 1):
            values = values.expand_as(kept)
        return as_float(name, values, like=kept)[kept].to(dtype)

    counts = kept.sum(1)
    segments = objective.segment_tokens(
        packed("entropy", entropy.detach()),
        counts[counts > 0],
        vocab_size=vocab_size,
        num_responses=len(kept) if num_responses is None else num_responses,
        num_tokens=int(counts.sum()) if num_tokens is None else num_tokens,
    )
    if correction is not None:
        factor = packed("correction", correction.detach(), rows=True)
        check_range("correction", factor, -math.inf, math.inf, "finite numbers")
        segments = replace(segments, weight=segments.weight * factor)
    inputs = LossInputs(
        packed("logprob", logprob),
        packed("old_logprob", old_logprob.detach()),
        packed("advantage", advantage, rows=True),
        segments,
    )
    output = objective.loss(inputs)
    ratio = torch.ones_like(kept, dtype=dtype).masked_scatter(kept, output.ratio)
    no_gradient = torch.ones_like(kept).masked_scatter(kept, output.no_gradient)
    return LossOutput(output.loss, ratio, no_gradient)
