"""Brings up torch.distributed and Megatron's process groups, once, at the edge."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_espo.mcore import cpu


@dataclass(frozen=True)
class Runtime:
    """Where this process stands.

    Attributes:
        rank: global rank.
        world_size: number of ranks.
        device: device of this rank's model.
        groups: Megatron's process groups (``ProcessGroupCollection``), handed on as an argument and never fetched again.
    """

    rank: int
    world_size: int
    device: torch.device
    groups: "ProcessGroupCollection"  # noqa: F821 - megatron is imported inside initialize

    @property
    def is_main(self) -> bool:
        """Whether this is global rank 0, which logs and writes files."""
        return self.rank == 0


PARALLEL_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


def parallel_sizes(settings: Any) -> dict[str, int | None]:
    """The arguments of :func:`initialize` that ``settings`` (the ``megatron`` section of the configuration) carries."""
    return {name: getattr(settings, name) for name in PARALLEL_SIZES}


def initialize(
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    context_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    expert_tensor_parallel_size: int | None = None,
    seed: int = 1,
    timeout_s: float = 1800,
) -> Runtime:
    """Initialize distributed state from torchrun's environment. Collective over all ranks.

    NCCL where there is CUDA, gloo elsewhere; without ``RANK`` in the environment the process is a world of one.

    Args:
        seed: seeds weights and dropout through Megatron's random number tracker (different per TP/PP rank where it must be).
        timeout_s: seconds after which a collective that does not complete is an error.
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
        _init_process_group("gloo" if without_cuda else "nccl", timeout_s)
    parallel_state.destroy_model_parallel()  # of an earlier call, with another layout
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_model_parallel_size,
        context_parallel_size=context_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_parallel_size,
        distributed_timeout_minutes=max(1, int(timeout_s // 60)),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Runtime(dist.get_rank(), dist.get_world_size(), device, groups)


def _init_process_group(backend: str, timeout_s: float) -> None:
    timeout = timedelta(seconds=timeout_s)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def shutdown() -> None:
    """Release Megatron's and torch's process groups."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
