"""Collectives of Python objects. Without a process group the process is the only rank."""

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@functools.lru_cache(maxsize=1)
def object_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return the group of all ranks for these collectives. The first call is collective.

    Ranks wait here for rank 0 while it samples, for longer than the timeout of ``world``. With NCCL
    they would run a kernel meanwhile, on GPUs that an engine may use. The watchdog ends a run that
    makes no progress.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))


def on_rank_0(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 and return its result, or raise its exception, on every rank.

    Collectives: one broadcast over all ranks.
    """
    if not dist.is_initialized():
        return work()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0, group=object_group(dist.group.WORLD))
    if box[1] is not None:
        raise box[1]
    return box[0]


def gather_objects(own: T) -> list[T]:
    """Return the objects of all ranks, in rank order, on rank 0; ``[]`` elsewhere.

    Collectives: one gather to rank 0.
    """
    if not dist.is_initialized():
        return [own]
    objects: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(own, objects or None, dst=0, group=object_group(dist.group.WORLD))
    return objects


def first_not_none(own: T | None) -> T | None:
    """Return the object of the lowest rank that passes one, on every rank; None if no rank does.

    Collectives: one gather on all ranks.
    """
    if not dist.is_initialized():
        return own
    objects: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(objects, own, group=object_group(dist.group.WORLD))
    return next((found for found in objects if found is not None), None)


def control_device() -> torch.device:
    """Return the device that collectives of the default process group need."""
    is_nccl = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")
