"""Cuts a micro-batch for context parallelism: every sequence into 2 x CP chunks, two for each rank
(zigzag).

With causal attention the work of a token grows with its position. Rank ``r`` gets chunks ``r`` and
``2 CP - 1 - r``, so that all ranks do the same work. Megatron-Core's rotary embedding and
Transformer Engine expect this order. Zero collectives.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_espo.data.batches import MicroBatch


def zigzag(boundaries: Tensor, rank: int, size: int) -> Tensor:
    """Packed positions ``[total / size]`` int64 of one rank's tokens, sequence after sequence.

    Args:
        boundaries: ``[sequences + 1]``, each length a multiple of ``2 size``.
    """
    sequences = torch.arange(int(boundaries[-1])).split(boundaries.diff().tolist())
    chunks = [sequence.chunk(2 * size) for sequence in sequences]
    return torch.cat([part for c in chunks for part in (c[rank], c[2 * size - 1 - rank])])


def slice_micro_batch(batch: MicroBatch, rank: int, size: int) -> MicroBatch:
    """The tokens of one context-parallel rank, and the trained tokens that they predict.

    ``cu_seqlens`` and ``lengths`` stay those of the whole micro-batch. ``local_tokens`` selects
    this rank's trained tokens.
    """
    assert batch.cu_seqlens is not None
    local = zigzag(batch.cu_seqlens, rank, size)
    place = torch.full((batch.tokens.size(1),), -1, dtype=torch.int32)
    place[local] = torch.arange(len(local), dtype=torch.int32)
    local_tokens = (place[batch.logit_positions] >= 0).nonzero()[:, 0]
    mask = batch.sampling_mask
    if mask is not None:
        mask = mask[:, torch.isin(mask[0], local_tokens)]
        mask[0] = torch.searchsorted(local_tokens, mask[0])
    per_token = ("targets", "advantage", "rollout_logprob", "old_logprob", "old_entropy")
    known: dict[str, Any] = {name: getattr(batch, name) for name in per_token}
    return replace(
        batch,
        tokens=batch.tokens[:, local],
        position_ids=batch.position_ids[:, local],
        logit_positions=place[batch.logit_positions[local_tokens]],
        routed_experts=None if batch.routed_experts is None else batch.routed_experts[local],
        sampling_mask=mask,
        local_tokens=local_tokens,
        # Megatron adds these counts over context-parallel ranks.
        num_tokens=batch.num_tokens if rank == 0 else 0,
        **{name: values[local_tokens] for name, values in known.items() if values is not None},
    )
