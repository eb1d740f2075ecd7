"""Log-probs of given tokens by the trained model: the trainer's half of a canary."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_espo.data.packing import MicroBatch, TrainSequence, batch_totals, pack
from megatron_espo.mcore.optimizer import Policy


def score_responses(
    policy: Policy, forward_step, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], packing: dict[str, Any]
) -> list[list[float]]:
    """Log-probs (nats, at the temperature of ``forward_step``) of each response's tokens given its prompt.

    Every data-parallel replica computes all of them, each in a micro-batch of its own. Collective over all ranks: one forward-only pass through Megatron's
    schedule and one object broadcast from the last rank, which is on the last pipeline stage.

    Args:
        pairs: (prompt token ids, response token ids), the same on every rank.
        packing: the layout's (``learner.packing_options``).

    Returns:
        The same lists on every rank.
    """
    if not pairs:
        return []
    everyone = packing | {"data_parallel_rank": 0, "data_parallel_size": 1, "share_prompts": False, "max_sequences": 1}
    # Longest first, as ``pack`` lays them out: one micro-batch each, in this order.
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    sequences = [TrainSequence(*pairs[i], [0.0] * len(pairs[i][1]), 0.0) for i in order]
    totals = batch_totals(sequences, num_responses=len(sequences), num_response_tokens=1)
    batches = pack(sequences, totals, **everyone)
    scored = policy.score(forward_step, batches)
    whole = [_whole(batch, values[0], policy.groups.cp) for batch, values in zip(batches, scored, strict=False)]
    box = [dict(zip(order, whole, strict=False))]
    dist.broadcast_object_list(box, src=dist.get_world_size() - 1)
    return [box[0][i] for i in range(len(pairs))]


def _whole(batch: MicroBatch, logprob: Tensor, cp_group) -> list[float]:
    """All response tokens' log-probs from the context-parallel ranks' slices."""
    if batch.scored is None:
        return logprob.tolist()
    everything = logprob.new_zeros(int(batch.lengths.sum())).index_copy_(0, batch.scored.to(logprob.device), logprob)
    dist.all_reduce(everything, group=cp_group)
    return everything.tolist()
