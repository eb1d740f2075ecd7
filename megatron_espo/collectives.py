"""What ranks tell each other beside tensors, in messages whose number grows with the ranks, not with their square.

A process without a process group is the only rank.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def on_rank_0(work: Callable[[], Any]) -> Any:
    """Do something on rank 0; its answer is returned, or its failure raised, on every rank. One broadcast over all ranks."""
    if not dist.is_initialized():
        return work()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def gathered(own: Any) -> list[Any]:
    """The objects of all ranks in their order, on rank 0; ``[]`` elsewhere. One gather to rank 0."""
    if not dist.is_initialized():
        return [own]
    everyone: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(own, everyone or None, dst=0)
    return everyone


def first_answer(own: Any) -> Any:
    """The object of the first rank that has one, on every rank; None where all have None. One all-reduce of an integer, then a broadcast if there is one."""
    if not dist.is_initialized():
        return own
    ranks = dist.get_world_size()
    first = torch.tensor(ranks if own is None else dist.get_rank(), device=control_device())
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    if int(first) == ranks:
        return None
    box = [own]
    dist.broadcast_object_list(box, src=int(first))
    return box[0]


def control_device() -> torch.device:
    """Where tensors for collectives of the default process group must be."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
