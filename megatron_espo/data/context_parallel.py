"""Cuts a micro-batch for context parallelism: every sequence in 2 x CP chunks, two of them for each rank (zigzag).

Causal attention costs more the later a token is; rank ``r`` gets chunks ``r`` and ``2 CP - 1 - r``, so that all ranks do the same work. This is
the order that Megatron-Core's rotary embedding and Transformer Engine expect. Pure bookkeeping: zero collectives.
"""

from dataclasses import replace

import torch
from torch import Tensor

from megatron_espo.data.batches import MicroBatch


def zigzag(borders: Tensor, rank: int, size: int) -> Tensor:
    """Packed positions ``[total / size]`` int64 of one rank's tokens, sequence after sequence.

    Args:
        borders: ``[sequences + 1]``, each length a multiple of ``2 size``.
    """
    parts = []
    for start, stop in zip(borders.tolist(), borders.tolist()[1:], strict=False):
        chunk = (stop - start) // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            parts.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
    return torch.cat(parts)


def slice_micro_batch(batch: MicroBatch, rank: int, size: int) -> MicroBatch:
    """One context-parallel rank's tokens, and those response tokens that they predict.

    Borders and lengths stay those of the whole; ``scored`` says which of the whole micro-batch's response tokens are here.
    """
    local = zigzag(batch.cu_seqlens, rank, size)
    place = torch.full((batch.tokens.size(1),), -1)
    place[local] = torch.arange(len(local))
    scored = (place[batch.predict] >= 0).nonzero()[:, 0]
    return replace(
        batch,
        tokens=batch.tokens[:, local],
        position_ids=batch.position_ids[:, local],
        predict=place[batch.predict[scored]],
        targets=batch.targets[scored],
        advantage=batch.advantage[scored],
        rollout_logprob=batch.rollout_logprob[scored],
        old_logprob=None if batch.old_logprob is None else batch.old_logprob[scored],
        old_entropy=None if batch.old_entropy is None else batch.old_entropy[scored],
        routed_experts=None if batch.routed_experts is None else batch.routed_experts[local],
        scored=scored,
        # Megatron adds these counts over context-parallel ranks.
        num_tokens=batch.num_tokens if rank == 0 else 0,
    )
