"""Initialize torch.distributed and Megatron's process groups."""

import gc
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_espo.distributed import cpu
from megatron_espo.distributed.collectives import object_group

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

PARALLEL_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


@dataclass(frozen=True)
class Runtime:
    """This process's rank, device and process groups.

    Attributes:
        rank: global rank.
        world_size: number of ranks.
        device: device of this rank's model.
        groups: Megatron's process groups. They are passed on as arguments and read only here.
    """

    rank: int
    world_size: int
    device: torch.device
    groups: "ProcessGroupCollection"

    @property
    def role(self) -> str:
        """Name of this rank with its place in the layout, such as ``rank3_dp0_pp1_cp0_tp1``."""
        places = [f"{n}{getattr(self.groups, n).rank()}" for n in ("dp", "pp", "cp", "tp")]
        return "_".join([f"rank{self.rank}", *places])

    @property
    def is_main(self) -> bool:
        """Whether this is global rank 0, which logs and writes files."""
        return self.rank == 0


def parallel_sizes(settings: Any) -> dict[str, Any]:
    """Return ``PARALLEL_SIZES`` of the configuration's ``megatron`` section, for `initialize`."""
    return {name: getattr(settings, name) for name in PARALLEL_SIZES}


def initialize(*, seed: int = 1, **sizes: int | None) -> Runtime:
    """Initialize distributed state from torchrun's environment. Collective over all ranks.

    The backend is NCCL with CUDA and gloo without. Without ``RANK`` in the environment the process
    is the only rank. An incomplete collective is an error after 30 minutes. A second call replaces
    Megatron's process groups by those of another layout.

    Args:
        seed: seed of Megatron's random number tracker (which adds the TP and PP rank) and of torch.
        sizes: ``PARALLEL_SIZES`` by name; a missing size is Megatron's default.
    """
    without_cuda = cpu.install()
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    if without_cuda:
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(
            "gloo" if without_cuda else "nccl",
            timeout=timedelta(minutes=30),  # as Megatron's groups
            **({} if "RANK" in os.environ else alone),
        )
    _destroy_groups()
    parallel_state.initialize_model_parallel(**sizes)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Runtime(dist.get_rank(), dist.get_world_size(), device, groups)


def _destroy_groups() -> None:
    """Destroy Megatron's process groups. Megatron only forgets them, and their threads go on."""
    from megatron.core import parallel_state

    for group in parallel_state._global_process_group_list or ():
        if group is not None:
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
    gc.collect()  # a model of these groups is in reference cycles, and keeps them


def shutdown() -> None:
    """Destroy Megatron's and torch's process groups."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    object_group.cache_clear()
