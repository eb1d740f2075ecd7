"""Sends the tokens of a step from rank 0 to the data-parallel replicas that train them."""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_espo.data.packing import TrainSequence, shard_by_tokens
from megatron_espo.distributed.checksum import array_checksum
from megatron_espo.distributed.collectives import control_device
from megatron_espo.models.spec import Experts
from megatron_espo.types import SamplingMask


def scatter_sequences(
    sequences: Sequence[TrainSequence],
    groups: Any,
    share_prompts: bool,
    checksums: dict[str, int],
    masks: bool = False,
    experts: Experts | None = None,
) -> list[TrainSequence]:
    """Send ids and log-probs from rank 0 to the data-parallel replica that trains each sequence.

    Collectives over all ranks: for each replica two messages (length, values) from rank 0 to its
    first rank, and broadcasts from there over the context-, tensor- and pipeline-parallel groups.
    With ``experts`` the same with one message for each sequence.

    Args:
        sequences: the same on every rank, except that ids and log-probs count on rank 0 only.
        groups: Megatron's ``ProcessGroupCollection``.
        share_prompts: as for :func:`megatron_espo.data.packing.pack`.
        checksums: gets the checksum of each replica's share, on rank 0 and on the replica; a second
            call continues the checksum of the first.
        masks: also send sampling masks, which every sequence of rank 0 has.
        experts: of the model; also send routed experts, which every sequence of rank 0 has.

    Returns:
        The sequences; those of this rank's replica have the values of rank 0.
    """
    shards = shard_by_tokens(sequences, groups.dp.size(), share_prompts)
    result, is_source = list(sequences), dist.get_rank() == 0
    is_alone = groups.dp.size() == dist.get_world_size()  # a replica is one rank
    for owner, shard in enumerate(shards):
        share = [number for group in shard for number in group]
        is_own = owner == groups.dp.rank()
        if not (is_own or is_source) or (is_own and is_source and is_alone):
            continue
        own = [sequences[number] for number in share]
        words = to_words(own) if is_source else np.empty(0, np.int32)
        (length,) = send_to_replica(np.array([len(words)]), owner, groups)
        if not is_source:
            words = np.empty(length, np.int32)
        words = send_to_replica(words, owner, groups)
        name = f"responses of data-parallel rank {owner} (checksum)"
        checksums[name] = array_checksum(words, checksums.get(name, 0))
        if not is_source:
            own = from_words(own, words, masks)
        if experts is not None:
            own = [_send_experts(sequence, experts, owner, groups) for sequence in own]
        for number, sequence in zip(share, own, strict=True):
            result[number] = sequence
    return result


def to_words(sequences: Sequence[TrainSequence]) -> np.ndarray:
    """Prompt ids, response ids, log-probs and the sampling mask (counts, ids) if there is one,
    sequence after sequence, as int32.
    """
    parts = [np.empty(0, np.int32)]
    for s in sequences:
        parts += s.prompt_ids, s.response_ids, s.rollout_logprobs.view(np.int32)
        if s.sampling_mask is not None:
            parts += s.sampling_mask.counts, s.sampling_mask.ids
    return np.concatenate(parts)


def from_words(
    sequences: Sequence[TrainSequence], words: np.ndarray, masks: bool = False
) -> list[TrainSequence]:
    """``sequences`` with the values of :func:`to_words`, as views of ``words``.

    Not checked again: rank 0 has checked them, and they have the lengths of the placeholders.

    Args:
        masks: whether ``words`` has sampling masks.
    """
    result, start = list(map(copy, sequences)), 0

    def take(length: int) -> np.ndarray:
        nonlocal start
        start += length
        return words[start - length : start]

    for sequence in result:
        length = len(sequence.response_ids)
        vars(sequence).update(
            prompt_ids=take(len(sequence.prompt_ids)),
            response_ids=take(length),
            rollout_logprobs=take(length).view(np.float32),
        )
        if masks:
            counts = take(length)
            vars(sequence).update(sampling_mask=SamplingMask(take(int(counts.sum())), counts))
    return result


def _send_experts(
    sequence: TrainSequence, experts: Experts, owner: int, groups: Any
) -> TrainSequence:
    """Return ``sequence`` with the routed experts of rank 0."""
    shape = (sequence.num_tokens - 1, sum(experts.layers), experts.per_token)
    dtype = np.dtype(np.uint8 if experts.count <= 256 else np.uint16)
    rows = np.empty(shape, dtype)
    if dist.get_rank() == 0:
        rows[:] = sequence.routed_experts
    received = send_to_replica(rows.reshape(-1).view(np.uint8), owner, groups)
    return replace(sequence, routed_experts=received.view(dtype).reshape(shape))


def send_to_replica(values: np.ndarray, owner: int, groups: Any) -> np.ndarray:
    """Send ``values`` from rank 0 to all ranks of a data-parallel replica, all of which call this.

    Args:
        values: of rank 0; on the other ranks an array of the same shape and dtype.
    """
    data = torch.from_numpy(values).to(control_device())
    replica = (groups.cp, groups.tp, groups.pp)
    if dist.get_rank() == 0 and owner > 0:
        dist.send(data, dist.get_global_rank(groups.dp, owner))
        return values
    if owner > 0 and all(group.rank() == 0 for group in replica):
        dist.recv(data, src=0)
    for number, group in enumerate(replica):
        # Each broadcast starts from the ranks that the earlier ones have reached.
        if all(later.rank() == 0 for later in replica[number + 1 :]):
            dist.broadcast(data, group=group, group_src=0)
    return data.cpu().numpy()
