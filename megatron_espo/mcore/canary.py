"""Log-probs of given tokens by the trained model: the trainer's half of a canary."""

from collections.abc import Sequence

import torch.distributed as dist

from megatron_espo.data.packing import MicroBatch, TrainSequence, batch_totals, pack
from megatron_espo.mcore.optimizer import Policy


def score_responses(
    policy: Policy, forward_step, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], **packing
) -> list[list[float]]:
    """Log-probs (nats, at the temperature of ``forward_step``) of each response's tokens given its prompt.

    Every data-parallel replica computes all of them. Collective over all ranks: one forward-only pass through Megatron's
    schedule and one object broadcast from the last rank, which is on the last pipeline stage.

    Args:
        pairs: (prompt token ids, response token ids), the same on every rank.
        packing: further arguments of ``data.packing.pack``, such as ``multiple_of``.

    Returns:
        The same lists on every rank.
    """
    scored = policy.score(forward_step, [_micro_batch(prompt, response, packing) for prompt, response in pairs])
    box = [[logprob.tolist() for logprob, _ in scored]]
    dist.broadcast_object_list(box, src=dist.get_world_size() - 1)
    return box[0]


def _micro_batch(prompt: Sequence[int], response: Sequence[int], packing: dict) -> MicroBatch:
    sequences = [TrainSequence(prompt, response, [0.0] * len(response), 0.0)]
    totals = batch_totals(sequences, num_responses=1, num_response_tokens=len(response))
    (batch,) = pack(
        sequences, totals, data_parallel_rank=0, data_parallel_size=1, max_tokens=len(prompt) + len(response), **packing
    )
    return batch
