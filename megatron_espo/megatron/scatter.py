"""Sends the tokens of a step from rank 0 to the data-parallel replicas that train them."""

import pickle
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_espo.data.packing import TrainSequence, shard_by_tokens
from megatron_espo.distributed.checksum import array_checksum
from megatron_espo.megatron.consistency import check_fingerprints

# Sequences that one scatter sends to all replicas together, or one to each. With NCCL they are on
# rank 0's GPU at once, and routed experts take megabytes a sequence.
_AT_ONCE = 16


def scatter_sequences(
    sequences: Sequence[TrainSequence], groups: Any, share_prompts: bool
) -> list[TrainSequence]:
    """Send each sequence from rank 0 to the data-parallel replica that trains it.

    Collectives over all ranks: for each part of the sequences a scatter of objects over the first
    ranks of the replicas, and broadcasts of objects from there over the context-, tensor- and
    pipeline-parallel groups; then one comparison of checksums.

    Args:
        sequences: on rank 0 the sequences; on other ranks sequences of the same lengths.
        groups: Megatron's ``ProcessGroupCollection``.
        share_prompts: as for :func:`megatron_espo.data.packing.pack`.

    Returns:
        The sequences; those of this rank's replica are the sequences of rank 0.

    Raises:
        RankMismatch: on every rank, if a rank did not receive the bytes that rank 0 sent.
    """
    shards = shard_by_tokens(sequences, groups.dp.size(), share_prompts)
    shares = [[number for group in shard for number in group] for shard in shards]
    replica, own = (groups.cp, groups.tp, groups.pp), groups.dp.rank()
    checksums: dict[str, int] = defaultdict(int)
    received: list[tuple[list[int], bytes]] = []
    count = max(1, _AT_ONCE // len(shares))
    for start in range(0, max(map(len, shares)), count):
        parts = [share[start : start + count] for share in shares]
        box: list[Any] = [None]
        sent: list[bytes] = []
        if dist.get_rank() == 0:
            # As bytes: damage is found before anything is unpickled.
            sent = [pickle.dumps([sequences[number] for number in part]) for part in parts]
        if all(group.rank() == 0 for group in replica):
            dist.scatter_object_list(box, sent, group=groups.dp, group_src=0)
        for number, group in enumerate(replica):
            # Each broadcast starts from the ranks that the earlier ones have reached.
            if group.size() > 1 and all(later.rank() == 0 for later in replica[number + 1 :]):
                dist.broadcast_object_list(box, group=group, group_src=0)
        if not sent:
            received.append((parts[own], box[0]))
        for owner, data in enumerate(sent) if sent else [(own, box[0])]:
            name = f"responses of data-parallel rank {owner} (checksum)"
            checksums[name] = array_checksum(np.frombuffer(data, np.uint8), checksums[name])
    check_fingerprints(checksums)
    result = list(sequences)
    for part, data in received:
        for number, sequence in zip(part, pickle.loads(data), strict=True):
            result[number] = sequence
    return result
