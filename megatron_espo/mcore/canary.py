"""Log-probs of given tokens by the trained model: the trainer's half of a canary."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_espo.data.packing import TrainSequence, batch_totals, pack
from megatron_espo.mcore.optimizer import Policy

# Prompt token ids, response token ids, and of these the engine's experts (``TrainSequence.routed_experts``).
Scored = tuple[Sequence[int], Sequence[int], np.ndarray | None]


def score_responses(policy: Policy, forward_step, responses: Sequence[Scored], packing: dict[str, Any]) -> list[list[float]]:
    """Log-probs (nats, at the temperature of ``forward_step``) of each response's tokens given its prompt.

    Every data-parallel replica computes all of them, in one micro-batch. Collective over all ranks: one forward-only pass
    through Megatron's schedule, under context parallelism one all-reduce of the log-probs, and one object broadcast from the last rank, which is
    on the last pipeline stage.

    Args:
        responses: the same on every rank.
        packing: the layout's (``learner.packing_options``).

    Returns:
        The same lists on every rank.
    """
    one_batch = {"data_parallel_rank": 0, "data_parallel_size": 1, "max_tokens": sys.maxsize, "max_sequences": None}
    # The order in which ``pack`` lays sequences out, which share no prompt here.
    order = sorted(range(len(responses)), key=lambda i: len(responses[i][0]) + len(responses[i][1]), reverse=True)
    sequences = [
        TrainSequence(prompt, response, np.zeros(len(response), np.float32), 0.0, routed_experts=experts)
        for prompt, response, experts in (responses[i] for i in order)
    ]
    lengths = [len(sequence.response_ids) for sequence in sequences]
    totals = batch_totals(sequences, num_responses=len(responses), num_response_tokens=sum(lengths))
    batches = pack(sequences, totals, **packing | one_batch | {"share_prompts": False})
    assert batches[0].lengths.tolist() == lengths
    box = [[]]
    if scored := policy.score(forward_step, batches):
        logprob = scored[0][0]
        if batches[0].local_tokens is not None:
            mine = batches[0].local_tokens.to(logprob.device)
            logprob = logprob.new_zeros(sum(lengths)).index_copy_(0, mine, logprob)
            dist.all_reduce(logprob, group=policy.groups.cp)
        box = [[part.tolist() for part in logprob.split(lengths)]]
    dist.broadcast_object_list(box, src=dist.get_world_size() - 1)
    by_index = dict(zip(order, box[0], strict=True))
    return [by_index[i] for i in range(len(responses))]
