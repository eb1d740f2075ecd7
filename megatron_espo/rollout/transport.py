"""Choice and construction of vLLM's weight transports. Imports vLLM on first use."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_espo.distributed.collectives import on_rank_0
from megatron_espo.errors import InputError
from megatron_espo.rollout.vllm_engine import VLLMEngine

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer import base

_OWN, _SHARED = "GPUs of its own", "the trainer's GPU"
# Name -> where the engine runs.
TRANSPORTS = {"files": "any machine", "ipc": _SHARED}
TRANSPORTS |= dict.fromkeys(("nccl", "nccl_m2n", "sharded_rdt"), _OWN)
# Every trainer rank sends its copy or shard. With the other transports rank 0 sends everything.
ON_ALL_RANKS = ("ipc", "nccl_m2n", "sharded_rdt")
_RAY_NAMESPACE = "megatron_espo"


def needs_all_replicas(name: str, engines: int) -> bool:
    """Whether every trainer rank gathers the weights, not only the first replica."""
    return name in ON_ALL_RANKS or engines > 1


def register_transports() -> None:
    """Register this project's transports with vLLM in this process."""
    import megatron_espo.rollout.file_transport
    import megatron_espo.rollout.ipc_transport  # noqa: F401  both register on import


def resolve_transport(name: str, visible_devices: str | None = None, on_hosts: bool = False) -> str:
    """The transport that ``rollout.transport`` means on this machine.

    ``auto`` is ``files`` without a GPU, ``nccl`` if the engine has GPUs of its own, else ``ipc``.

    Args:
        visible_devices: ``rollout.visible_devices``.
        on_hosts: the engine is on another machine (``rollout.hosts``).

    Raises:
        InputError: there is no GPU, or the engine has the wrong GPUs.
    """
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        name = ("nccl" if visible_devices or on_hosts else "ipc") if has_gpu else "files"
    if name != "files" and not has_gpu:
        raise InputError(
            f"rollout.transport: {name!r} needs a GPU and none is available; use files or auto."
        )
    if not on_hosts:
        check_placement(name, visible_devices, os.environ)
    return name


def check_placement(name: str, visible_devices: str | None, environment: Mapping[str, str]) -> None:
    """Raise InputError unless the engine has the GPUs that the transport ``name`` needs.

    Args:
        visible_devices: ``rollout.visible_devices``; ``None``: the engine shares the trainer's.
        environment: of this rank. LOCAL_WORLD_SIZE and CUDA_VISIBLE_DEVICES give its GPUs.
    """
    where, trainer = TRANSPORTS[name], _trainer_devices(environment)
    shares = visible_devices is None or not set(trainer).isdisjoint(visible_devices.split(","))
    if where == (_OWN if shares else _SHARED):
        raise InputError(
            f"rollout.visible_devices: transport {name} needs the engine on {where} (the trainer "
            f"has GPUs {','.join(trainer)}), got {visible_devices or 'null (the same GPUs)'}"
        )


def engine_devices(
    visible_devices: str | None, engines: int, workers: int, environment: Mapping[str, str]
) -> str | None:
    """CUDA_VISIBLE_DEVICES of this rank's engine; ``None``: inherited.

    If several engines share the trainer's GPUs, each takes the GPU of its owner and the next ones.

    Args:
        visible_devices: ``rollout.visible_devices``; applies to every machine with an engine.
        environment: of this rank, with torchrun's LOCAL_RANK.
    """
    if visible_devices is not None or engines == 1 or not torch.cuda.is_available():
        return visible_devices
    first = int(environment.get("LOCAL_RANK", "0"))
    return ",".join(_trainer_devices(environment)[first : first + workers])


def _trainer_devices(environment: Mapping[str, str]) -> list[str]:
    """GPUs of the trainer's ranks on this machine."""
    ranks = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    devices = environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(ranks))))
    return devices.split(",")[:ranks]


def make_trainer_transport(
    name: str, *, engine: VLLMEngine | None, source: "base.WeightSource", rank: int
) -> "base.TrainerWeightTransferEngine":
    """Connect a trainer to its rollout engine. Call it on every rank, and again after a restart.

    Args:
        name: one of ``TRANSPORTS``; the engine's transport.
        engine: the started engine on ranks that own one (rank 0 does), else ``None``.
        source: this rank's view of the trained weights under Hugging Face names.
        rank: of this process among the trainer's ranks.

    Returns:
        vLLM's trainer-side engine, for :func:`send_weights`.

    Collectives: those of ``source.metadata()``. ``nccl_m2n`` and ``sharded_rdt`` broadcast from
    rank 0; ``ipc`` uses the default group in every update.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    info = _init_info(name, engine, rank)
    # vLLM calls the client only on ranks that have one.
    return WeightTransferTrainerFactory.trainer_init(info, client=engine, source=source)  # type: ignore[arg-type]


def _init_info(name: str, engine: VLLMEngine | None, rank: int) -> "base.TrainerInitInfo":
    is_spanning = name in ("nccl_m2n", "sharded_rdt")
    if engine is not None and not is_spanning:
        rank = 0  # vLLM calls the sender rank 0; every engine has its own sender
    workers = engine.config.tensor_parallel_size if engine is not None else 0
    on_hosts = engine is not None and bool(engine.config.hosts)
    if name == "files":
        from megatron_espo.rollout.file_transport import FileTrainerInitInfo

        if engine is None or not on_hosts:
            return FileTrainerInitInfo(rank=rank)
        log = engine.config.log_path.absolute()
        return FileTrainerInitInfo(rank=rank, folder=str(log.parent / "weights"), name=log.stem)
    if name == "ipc":
        from megatron_espo.rollout.ipc_transport import IPCJsonTrainerInitInfo

        return IPCJsonTrainerInitInfo(rank=rank)
    if name == "sharded_rdt":
        import ray
        from vllm.distributed.weight_transfer.sharded_rdt_trainer import ShardedRDTTrainerInitInfo

        ray.init(address="auto", namespace=_RAY_NAMESPACE, ignore_reinit_error=True)
        workers = on_rank_0(lambda: workers)
        return ShardedRDTTrainerInitInfo(
            rank=rank,
            num_consumers=workers,
            workers_per_replica=workers,
            trainer_actor_namespace=_RAY_NAMESPACE,
        )
    from vllm.utils.network_utils import get_open_port

    address = engine.own_address if engine is not None else ""
    port = get_open_port() if engine is not None else 0
    if name == "nccl":  # the owner and its engine's workers meet on the owner's machine
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        return NCCLTrainerInitInfo(
            master_address=address, master_port=port, world_size=1 + workers, rank=rank
        )
    from vllm.distributed.weight_transfer.m2n_trainer import M2NTrainerInitInfo

    # All meet on rank 0's machine. A host may not be able to resolve MASTER_ADDR.
    if not on_hosts:
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    address, port, workers = on_rank_0(lambda: (address, port, workers))
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
