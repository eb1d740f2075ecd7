"""Cuts a micro-batch for context parallelism: every sequence in 2 x CP chunks, two of them for each rank (zigzag).

Causal attention costs more the later a token is; rank ``r`` gets chunks ``r`` and ``2 CP - 1 - r``, so that all ranks do the same work. This is
the order that Megatron-Core's rotary embedding and Transformer Engine expect. Pure bookkeeping: zero collectives.
"""

from dataclasses import replace

import torch
from torch import Tensor

from megatron_espo.data.batches import MicroBatch


def zigzag(boundaries: Tensor, rank: int, size: int) -> Tensor:
    """Packed positions ``[total / size]`` int64 of one rank's tokens, sequence after sequence.

    Args:
        boundaries: ``[sequences + 1]``, each length a multiple of ``2 size``.
    """
    parts = []
    for start, stop in zip(boundaries.tolist(), boundaries.tolist()[1:], strict=False):
        chunk = (stop - start) // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            parts.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
    return torch.cat(parts)


def slice_micro_batch(batch: MicroBatch, rank: int, size: int) -> MicroBatch:
    """One context-parallel rank's tokens, and the trained tokens that they predict.

    Boundaries and lengths stay those of the whole; ``local_tokens`` says which of the whole micro-batch's trained tokens are here.
    """
    local = zigzag(batch.cu_seqlens, rank, size)
    place = torch.full((batch.tokens.size(1),), -1)
    place[local] = torch.arange(len(local))
    local_tokens = (place[batch.logit_positions] >= 0).nonzero()[:, 0]
    return replace(
        batch,
        tokens=batch.tokens[:, local],
        position_ids=batch.position_ids[:, local],
        logit_positions=place[batch.logit_positions[local_tokens]],
        targets=batch.targets[local_tokens],
        advantage=batch.advantage[local_tokens],
        rollout_logprob=batch.rollout_logprob[local_tokens],
        old_logprob=None if batch.old_logprob is None else batch.old_logprob[local_tokens],
        old_entropy=None if batch.old_entropy is None else batch.old_entropy[local_tokens],
        routed_experts=None if batch.routed_experts is None else batch.routed_experts[local],
        local_tokens=local_tokens,
        # Megatron adds these counts over context-parallel ranks.
        num_tokens=batch.num_tokens if rank == 0 else 0,
    )
