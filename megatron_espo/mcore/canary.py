"""Log-probs of given tokens by the trained model: the trainer's half of a canary."""

from collections.abc import Sequence

import torch.distributed as dist

from megatron_espo.data.packing import TrainSequence, batch_totals, pack
from megatron_espo.mcore.optimizer import Policy

Pair = tuple[Sequence[int], Sequence[int]]


def score_responses(policy: Policy, forward_step, pairs: Sequence[Pair], multiple_of: int = 1) -> list[list[float]]:
    """Log-probs (nats, at the temperature of ``forward_step``) of each response's tokens given its prompt.

    Every data-parallel replica computes all of them, in one micro-batch. Collective over all ranks: one forward-only pass
    through Megatron's schedule and one object broadcast from the last rank, which is on the last pipeline stage.

    Args:
        pairs: (prompt token ids, response token ids), the same on every rank.
        multiple_of: as in ``data.packing.pack``.

    Returns:
        The same lists on every rank.
    """
    # The order in which ``pack`` lays sequences out.
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]), reverse=True)
    sequences = [TrainSequence(*pairs[i], [0.0] * len(pairs[i][1]), 0.0) for i in order]
    lengths = [len(sequence.response_ids) for sequence in sequences]
    totals = batch_totals(sequences, num_responses=len(pairs), num_response_tokens=sum(lengths))
    (batch,) = pack(
        sequences,
        totals,
        data_parallel_rank=0,
        data_parallel_size=1,
        max_tokens=totals.num_tokens,
        multiple_of=multiple_of,
    )
    assert batch.lengths.tolist() == lengths
    box = [[part.tolist() for logprob, _ in policy.score(forward_step, [batch]) for part in logprob.split(lengths)]]
    dist.broadcast_object_list(box, src=dist.get_world_size() - 1)
    by_index = dict(zip(order, box[0], strict=True))
    return [by_index[i] for i in range(len(pairs))]
