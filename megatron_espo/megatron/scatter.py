"""Sends the tokens of a step from rank 0 to the data-parallel replicas that train them."""

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_espo.data.packing import TrainSequence, shard_by_tokens
from megatron_espo.distributed.checksum import array_checksum
from megatron_espo.distributed.collectives import control_device
from megatron_espo.types import SamplingMask


def scatter_sequences(
    sequences: Sequence[TrainSequence],
    groups: Any,
    share_prompts: bool,
    checksums: dict[str, int],
    masks: bool = False,
) -> list[TrainSequence]:
    """Send ids and log-probs from rank 0 to the data-parallel replica that trains each sequence.

    Collectives over all ranks: for each replica a message from rank 0 to its first rank, and
    broadcasts from there over the context-, tensor- and pipeline-parallel groups. With ``masks``
    the same once more, for the sizes of the sampling masks.

    Args:
        sequences: the same on every rank, except that ids and log-probs count on rank 0 only.
        groups: Megatron's ``ProcessGroupCollection``.
        share_prompts: as for :func:`megatron_espo.data.packing.pack`.
        checksums: gets the checksum of each replica's share, on rank 0 and on the replica; a second
            call continues the checksum of the first.
        masks: also send sampling masks, which every sequence of rank 0 has.

    Returns:
        The sequences; those of this rank's replica have the ids and log-probs of rank 0.
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
        kept = np.zeros(len(own), np.int64)  # ids of each sampling mask
        if masks and is_source:
            kept[:] = [len(s.sampling_mask.ids) for s in own if s.sampling_mask is not None]
        if masks:
            sizes = torch.from_numpy(kept).to(control_device())
            kept = send_to_replica(sizes, owner, groups).cpu().numpy()
        if is_source:
            words = to_words(own)
        else:
            size = sum(2 * s.num_tokens - len(s.prompt_ids) for s in own) + int(kept.sum())
            words = np.empty(size + masks * sum(len(s.response_ids) for s in own), np.int32)
        data = send_to_replica(torch.from_numpy(words).to(control_device()), owner, groups)
        words = data.cpu().numpy()
        name = f"responses of data-parallel rank {owner} (checksum)"
        checksums[name] = array_checksum(words, checksums.get(name, 0))
        if not is_source:
            received = from_words(own, words, kept if masks else None)
            for number, sequence in zip(share, received, strict=True):
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
    sequences: Sequence[TrainSequence], words: np.ndarray, kept: np.ndarray | None = None
) -> list[TrainSequence]:
    """``sequences`` with the values of :func:`to_words`, as views of ``words``.

    Not checked again: rank 0 has checked them, and they have the lengths of the placeholders.

    Args:
        kept: number of ids of each sampling mask; ``None``: ``words`` has no masks.
    """
    result, start = list(map(copy, sequences)), 0

    def take(length: int) -> np.ndarray:
        nonlocal start
        start += length
        return words[start - length : start]

    for number, sequence in enumerate(result):
        length = len(sequence.response_ids)
        vars(sequence).update(
            prompt_ids=take(len(sequence.prompt_ids)),
            response_ids=take(length),
            rollout_logprobs=take(length).view(np.float32),
        )
        if kept is not None:
            counts = take(length)
            vars(sequence).update(sampling_mask=SamplingMask(take(int(kept[number])), counts))
    return result


def send_to_replica(data: Tensor, owner: int, groups: Any) -> Tensor:
    """Send ``data`` from rank 0 to all ranks of a data-parallel replica, all of which call this."""
    replica = (groups.cp, groups.tp, groups.pp)
    if dist.get_rank() == 0 and owner > 0:
        dist.send(data, dist.get_global_rank(groups.dp, owner))
        return data
    if owner > 0 and all(group.rank() == 0 for group in replica):
        dist.recv(data, src=0)
    for number, group in enumerate(replica):
        # Each broadcast starts from the ranks that the earlier ones have reached.
        if all(later.rank() == 0 for later in replica[number + 1 :]):
            dist.broadcast(data, group=group, group_src=0)
    return data
