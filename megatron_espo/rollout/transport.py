"""Which of vLLM's weight transports a run uses, and how it is built. vllm is imported on first use."""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_espo.errors import InputError
from megatron_espo.rollout.check_names import check_names
from megatron_espo.rollout.engine import RolloutEngine

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine, WeightSource

# Name -> where the engine runs, and the package beyond vLLM that the transport needs.
TRANSPORTS = {
    "files": ("any machine", None),
    "ipc": ("the trainer's GPU", None),
    "nccl": ("GPUs of its own", None),
    "nccl_m2n": ("GPUs of its own", "nccl"),
    "sharded_rdt": ("GPUs of its own", "ray"),
}
# Names under which vLLM's factories know our own versions of its transports.
_BACKENDS = {"ipc": "ipc_json"}
# Every trainer rank takes part with its own copy or shard; elsewhere rank 0 sends all.
ON_ALL_RANKS = ("ipc", "nccl_m2n", "sharded_rdt")
_RAY_NAMESPACE = "megatron_espo"


def register_transports() -> None:
    """Make our transports known to vLLM in this process; its plugin loader calls this (``vllm.general_plugins``)."""
    import megatron_espo.rollout.file_transport
    import megatron_espo.rollout.ipc_transport  # noqa: F401  both register on first import


def vllm_backend(name: str) -> str:
    """Backend in vLLM's factories for the transport ``name``."""
    return _BACKENDS.get(name, name)


def resolve_transport(name: str, visible_devices: str | None = None, on_hosts: bool = False) -> str:
    """The transport that ``rollout.transport`` stands for on this machine, its placement checked.

    ``auto``: on a GPU, ``ipc`` where the engine shares the trainer's and ``nccl`` where it has its own (``visible_devices``, ``on_hosts``);
    else ``files``.

    Args:
        on_hosts: the engine is on another machine (``rollout.hosts``).

    Raises:
        InputError: unknown name, no GPU, a package that is missing, or an engine on the wrong GPUs.
    """
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        name = ("nccl" if visible_devices or on_hosts else "ipc") if has_gpu else "files"
    if name not in TRANSPORTS:
        raise InputError(f"rollout.transport: expected auto, {', '.join(TRANSPORTS)}; got {name!r}.")
    if name != "files" and not has_gpu:
        raise InputError(f"rollout.transport: {name!r} needs a GPU and none is available; use files or auto.")
    if not on_hosts:
        check_placement(name, visible_devices, os.environ)
    package = TRANSPORTS[name][1]
    if package and importlib.util.find_spec(package) is None:
        raise InputError(f"rollout.transport: {name!r} needs the package {package!r}; install it, or use nccl.")
    return name


def check_placement(name: str, visible_devices: str | None, environment: Mapping[str, str]) -> None:
    """InputError unless the engine's GPUs are where the transport needs them.

    Args:
        visible_devices: ``rollout.visible_devices``; None: the engine shares the trainer's GPUs.
        environment: of this rank; torchrun's LOCAL_WORLD_SIZE and CUDA_VISIBLE_DEVICES tell the trainer's GPUs.
    """
    where = TRANSPORTS[name][0]
    own = _trainer_devices(environment)
    shared = sorted(set(own) & set((visible_devices or "").split(",")))
    problem = None
    if where == "GPUs of its own" and visible_devices is None:
        problem = "null (the trainer's); name GPUs that no trainer rank uses"
    elif where == "GPUs of its own" and shared:
        problem = f"{visible_devices!r}, of which a trainer rank uses {', '.join(shared)}"
    elif where == "the trainer's GPU" and visible_devices is not None and not shared:
        problem = f"{visible_devices!r}, which no trainer rank uses; use nccl, or leave it null"
    if problem:
        raise InputError(f"rollout.visible_devices: transport {name} needs the engine on {where}, got {problem}.")


def engine_devices(visible_devices: str | None, engines: int, workers: int, environment: Mapping[str, str]) -> str | None:
    """CUDA_VISIBLE_DEVICES of this rank's engine; None: inherited.

    Several engines that share the trainer's GPUs take those of their owner and of the ranks after it on its machine.

    Args:
        visible_devices: ``rollout.visible_devices``, which holds on every machine with an engine.
        environment: of this rank, with torchrun's LOCAL_RANK.

    Raises:
        InputError: the engine would reach beyond its owner's machine.
    """
    if visible_devices is not None or engines == 1 or not torch.cuda.is_available():
        return visible_devices
    own, first = _trainer_devices(environment), int(environment.get("LOCAL_RANK", "0"))
    if first + workers > len(own):
        raise InputError(
            f"rollout.engines: expected the engine of rank {environment.get('RANK', '0')} to fit on the {len(own) - first} GPUs from its "
            f"own on, got rollout.tensor_parallel_size {workers}; as many ranks a machine and engines as make each start a machine or a part of one"
        )
    return ",".join(own[first : first + workers])


def _trainer_devices(environment: Mapping[str, str]) -> list[str]:
    """GPUs of the trainer's ranks on this machine."""
    ranks = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    return environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(ranks)))).split(",")[:ranks]


def make_trainer_transport(
    name: str, *, engine: RolloutEngine | None, source: "WeightSource", rank: int
) -> "TrainerWeightTransferEngine":
    """Connect a trainer to its rollout engine. Called on every trainer rank, again after each engine restart.

    Args:
        name: one of ``TRANSPORTS``, or ``auto``; the same that the engine was started with.
        engine: the started engine on rank 0 and on every other rank that has one; None elsewhere. Its rank sends to it.
        source: this rank's view of the trained weights under Hugging Face names.
        rank: of this process among the trainer's ranks.

    Returns:
        vLLM's trainer-side engine; ``send_weights`` uses it.

    Raises:
        InputError: the transport is unknown or impossible here, differs from the engine's, or the source's names and
            shapes are not those of the engine's checkpoint (the message names the tensors).

    Collectives: those of ``source.metadata()``; ``nccl_m2n`` broadcasts the meeting point from rank 0; ``ipc`` uses the
    default group in every sync.
    """
    if name == "auto":
        name = resolve_transport(name)
    metas = source.metadata()
    if engine is None and rank == 0:
        raise InputError("Rank 0 sends the weights, so it needs the rollout engine; got engine=None.")
    if engine is not None:
        if engine.config.transport != name:
            raise InputError(f"The engine was started with transport {engine.config.transport!r}, not {name!r}.")
        check_names([(meta.name, tuple(meta.shape)) for meta in metas], engine.config.model)
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    return WeightTransferTrainerFactory.trainer_init(_init_info(name, engine, rank), client=engine, source=source)


def _init_info(name: str, engine: RolloutEngine | None, rank: int) -> "TrainerInitInfo":
    workers = engine.config.tensor_parallel_size if engine is not None else 0
    if name not in ("nccl_m2n", "sharded_rdt") and engine is not None:
        rank = 0  # vLLM's word for the sender; there is one for each engine
    address = engine.own_address if engine is not None else ""
    if name == "files":
        from megatron_espo.rollout.file_transport import FileTrainerInitInfo

        if engine is None or not engine.config.hosts:
            return FileTrainerInitInfo(rank=rank)
        log = Path(engine.config.log_path).absolute()
        return FileTrainerInitInfo(rank=rank, folder=str(log.parent / "weights"), name=log.stem)
    if name == "ipc":
        from megatron_espo.rollout.ipc_transport import IPCJsonTrainerInitInfo

        return IPCJsonTrainerInitInfo(rank=rank, packed=True)
    if name == "sharded_rdt":
        import ray
        from vllm.distributed.weight_transfer.sharded_rdt_trainer import ShardedRDTTrainerInitInfo

        ray.init(address="auto", namespace=_RAY_NAMESPACE, ignore_reinit_error=True)
        (workers,) = _from_rank_0([workers])
        return ShardedRDTTrainerInitInfo(
            rank=rank, num_consumers=workers, workers_per_replica=workers, trainer_actor_namespace=_RAY_NAMESPACE
        )
    from vllm.utils.network_utils import get_open_port

    port = get_open_port() if engine is not None else 0
    if name == "nccl_m2n":
        from vllm.distributed.weight_transfer.m2n_trainer import M2NTrainerInitInfo

        ranks = dist.get_world_size()
        # All meet on rank 0's machine, whose name for the trainer's ranks may mean nothing to an engine's.
        if engine is None or not engine.config.hosts:
            address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        address, port, workers = _from_rank_0([address, port, workers])
        return M2NTrainerInitInfo(
            rank=rank, master_address=address, master_port=port, world_size=ranks + workers, num_trainer_ranks=ranks
        )
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    # The engine's owner and its workers meet, on the owner's machine.
    return NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=1 + workers, rank=rank)


def _from_rank_0(values: list) -> list:
    dist.broadcast_object_list(values, src=0)
    return values


def send_weights(transport: "TrainerWeightTransferEngine", engine: RolloutEngine | None, version: int) -> None:
    """Bring the trainer's weights into the engine, which does not serve them before ``engine.serve()``.

    Called on every trainer rank.

    Raises:
        EngineError: on rank 0, when the engine refused or died. It then serves nothing until it is restarted and
            synced; the other ranks return normally, so agree on success before the next collective.
    """
    try:
        if engine is not None:
            engine.announce_version(version)
        transport.send_weights()
    except BaseException:
        if engine is not None:
            engine.reject()
        raise
