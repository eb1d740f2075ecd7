"""Choice and construction of vLLM's weight transports. Imports vLLM on first use."""

import os
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_espo.config import Rollout
from megatron_espo.distributed.addresses import address_towards, parse_address
from megatron_espo.distributed.collectives import on_rank_0
from megatron_espo.errors import InputError
from megatron_espo.rollout.vllm_engine import VLLMEngine

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer import base

_RAY_NAMESPACE = "megatron_espo"


def needs_all_replicas(name: str, engines: int) -> bool:
    """Whether every trainer rank gathers the weights, not only the first replica."""
    # With these transports every rank sends its copy or shard; otherwise rank 0 sends everything.
    return name in ("ipc", "nccl_m2n", "sharded_rdt") or engines > 1


def ipc_buffer_bytes(largest: int) -> int:
    """Bytes of each rank's GPU buffer for ``ipc``, which holds a tensor of ``largest`` bytes."""
    return max(1 << 30, largest)


def resolve_transport(rollout: Rollout) -> str:
    """The transport that ``rollout.transport`` means on this machine.

    ``auto`` is ``files`` without a GPU, ``nccl`` if the engine has GPUs of its own, else ``ipc``.

    Raises:
        InputError: there is no GPU, or the engine has the wrong GPUs.
    """
    name, devices, has_gpu = rollout.transport, rollout.visible_devices, torch.cuda.is_available()
    if name == "auto":
        name = ("nccl" if devices or rollout.hosts else "ipc") if has_gpu else "files"
    if name == "files":  # the engine may run anywhere
        return name
    if not has_gpu:
        raise InputError(
            f"rollout.transport: {name!r} needs a GPU and none is available; use files or auto."
        )
    trainer = _trainer_devices()
    shares = devices is None or not set(trainer).isdisjoint(devices.split(","))
    if not rollout.hosts and shares != (name == "ipc"):
        where = "the trainer's GPU" if name == "ipc" else "GPUs of its own"
        raise InputError(
            f"rollout.visible_devices: transport {name} needs the engine on {where} (the trainer "
            f"has GPUs {','.join(trainer)}), got {devices or 'null (the same GPUs)'}"
        )
    return name


def engine_devices(rollout: Rollout) -> str | None:
    """CUDA_VISIBLE_DEVICES of this rank's engine; ``None``: inherited.

    If several engines share the trainer's GPUs, each takes the GPU of its owner and the next ones.
    """
    devices = rollout.visible_devices
    if devices is not None or rollout.engines == 1 or not torch.cuda.is_available():
        return devices
    first = int(os.environ.get("LOCAL_RANK", "0"))
    return ",".join(_trainer_devices()[first : first + rollout.tensor_parallel_size])


def _trainer_devices() -> list[str]:
    """GPUs of the trainer's ranks on this machine."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(ranks))))
    return devices.split(",")[:ranks]


def make_trainer_transport(
    name: str, *, engine: VLLMEngine | None, source: "base.WeightSource", rank: int
) -> "base.TrainerWeightTransferEngine":
    """Connect a trainer to its rollout engine. Call it on every rank, and again after a restart.

    Args:
        name: one of ``rollout.transport``; the engine's transport.
        engine: the started engine on ranks that own one (rank 0 does), else ``None``.
        source: this rank's view of the trained weights under Hugging Face names.
        rank: of this process among the trainer's ranks.

    Returns:
        vLLM's trainer-side engine, for :func:`send_weights`.

    Collectives: those of ``source.metadata()``. ``nccl_m2n`` and ``sharded_rdt`` broadcast from
    rank 0; ``ipc`` uses the default group in every update.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    info = _init_info(name, engine, rank, source)
    # vLLM calls the client only on ranks that have one.
    return WeightTransferTrainerFactory.trainer_init(info, client=engine, source=source)  # type: ignore[arg-type]


def _init_info(
    name: str, engine: VLLMEngine | None, rank: int, source: "base.WeightSource"
) -> "base.TrainerInitInfo":
    from vllm.utils.network_utils import get_open_port

    address, port, workers, files = "127.0.0.1", 0, 0, ""
    if engine is not None:
        config = engine.config
        port, workers = get_open_port(), config.tensor_parallel_size
        if config.hosts:  # they may not be able to resolve MASTER_ADDR
            address = address_towards(parse_address(engine.address)[0])
            files = str(config.log_path.absolute().parent / "weights" / config.log_path.stem)
        elif name == "nccl_m2n":
            address = os.environ.get("MASTER_ADDR", address)
        if name not in ("nccl_m2n", "sharded_rdt"):
            rank = 0  # vLLM calls the sender rank 0; every engine has its own sender
    if name == "files":
        from megatron_espo.rollout.file_transport import FileTrainerInitInfo

        return FileTrainerInitInfo(rank=rank, prefix=files)
    if name == "ipc":
        from megatron_espo.rollout.ipc_transport import IPCJsonTrainerInitInfo

        largest = max(prod(item.shape) * item.dtype.itemsize for item in source.metadata())
        return IPCJsonTrainerInitInfo(rank=rank, packed_buffer_size_bytes=ipc_buffer_bytes(largest))
    if name == "nccl":  # the owner and its engine's workers meet on the owner's machine
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        return NCCLTrainerInitInfo(
            master_address=address, master_port=port, world_size=1 + workers, rank=rank
        )
    # All ranks and workers meet on rank 0's machine.
    address, port, workers = on_rank_0(lambda: (address, port, workers))
    if name == "sharded_rdt":
        import ray
        from vllm.distributed.weight_transfer.sharded_rdt_trainer import ShardedRDTTrainerInitInfo

        ray.init(address="auto", namespace=_RAY_NAMESPACE, ignore_reinit_error=True)
        return ShardedRDTTrainerInitInfo(
            rank=rank,
            num_consumers=workers,
            workers_per_replica=workers,
            trainer_actor_namespace=_RAY_NAMESPACE,
        )
    from vllm.distributed.weight_transfer.m2n_trainer import M2NTrainerInitInfo

    ranks = dist.get_world_size()
    return M2NTrainerInitInfo(
        rank=rank,
        master_address=address,
        master_port=port,
        world_size=ranks + workers,
        num_trainer_ranks=ranks,
    )


def send_weights(
    transport: "base.TrainerWeightTransferEngine", engine: VLLMEngine | None, version: int
) -> None:
    """Send the trainer's weights to the engine. Call it on every rank.

    The engine serves them after ``engine.serve()``.

    Raises:
        EngineError: on ranks with an engine: the engine refused or died, and was killed. The other
            ranks return normally, so agree on the result before the next collective.
    """
    if engine is not None:
        engine.next_version = version
    try:
        transport.send_weights()
    except BaseException:
        if engine is not None:
            engine.close()  # its layers would not accept another update
        raise
