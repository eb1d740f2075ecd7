"""The two tensor collectives under the names that the installed torch prefers (2.13 renamed them)."""

import torch.distributed as dist
from torch import Tensor


def all_gather(out: Tensor, part: Tensor, group: dist.ProcessGroup) -> None:
    """``out`` = every rank's ``part`` along the first dimension."""
    run = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    run(out, part, group=group)


def reduce_scatter(out: Tensor, whole: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Start ``out`` = this rank's rows of the sum of every rank's ``whole``."""
    run = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return run(out, whole, group=group, async_op=True)
