"""Which of vLLM's weight transports a run uses, and how it is built. vllm is imported on first use."""

from typing import TYPE_CHECKING

import torch

from megatron_espo.errors import InputError
from megatron_espo.rollout.engine import Engine
from megatron_espo.rollout.manifest import check_manifest

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine, WeightSource

TRANSPORTS = ("shared_memory", "ipc", "nccl")


def register_transports() -> None:
    """Make ``shared_memory`` known to vLLM in this process; its plugin loader calls this (``vllm.general_plugins``)."""
    import megatron_espo.rollout.shared_memory  # noqa: F401  registers on first import


def resolve_transport(name: str) -> str:
    """The transport that ``rollout.transport`` stands for on this machine.

    ``auto``: ``ipc`` (trainer and engine share a GPU) where CUDA is available, else ``shared_memory``. ``nccl`` is for
    an engine on GPUs of its own.

    Raises:
        InputError: unknown name, or ``ipc``/``nccl`` without a GPU.
    """
    has_gpu = torch.cuda.is_available()
    if name == "auto":
        return "ipc" if has_gpu else "shared_memory"
    if name not in TRANSPORTS:
        raise InputError(f"rollout.transport: expected auto, {', '.join(TRANSPORTS)}; got {name!r}.")
    if name != "shared_memory" and not has_gpu:
        raise InputError(f"rollout.transport: {name!r} needs a GPU and none is available; use shared_memory or auto.")
    return name


def make_trainer_transport(
    name: str, *, engine: Engine | None, source: "WeightSource", rank: int
) -> "TrainerWeightTransferEngine":
    """Connect a trainer to its rollout engine. Called on every trainer rank, again after each engine restart.

    Args:
        name: ``auto``, ``shared_memory``, ``ipc`` or ``nccl``; the same that the engine was started with.
        engine: the started engine on rank 0, which sends; None on the other ranks.
        source: this rank's view of the trained weights under Hugging Face names.
        rank: of this process among the trainer's ranks.

    Returns:
        vLLM's trainer-side engine; ``push_weights`` uses it.

    Raises:
        InputError: the transport is unknown or impossible here, differs from the engine's, or the source's names and
            shapes are not those of the engine's checkpoint (the message names the tensors).

    Collectives: those of ``source.metadata()``; ``ipc`` uses the default group in every sync.
    """
    name = resolve_transport(name)
    metas = source.metadata()
    if rank == 0:
        if engine is None:
            raise InputError("Rank 0 sends the weights, so it needs the rollout engine; got engine=None.")
        if engine.config.transport != name:
            raise InputError(f"The engine was started with transport {engine.config.transport!r}, not {name!r}.")
        check_manifest([(meta.name, tuple(meta.shape)) for meta in metas], engine.config.model)
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    return WeightTransferTrainerFactory.trainer_init(_init_info(name, engine, rank), client=engine, source=source)


def _init_info(name: str, engine: Engine | None, rank: int) -> "TrainerInitInfo":
    if name == "shared_memory":
        from megatron_espo.rollout.shared_memory import SharedMemoryTrainerInitInfo

        return SharedMemoryTrainerInitInfo(rank=rank)
    if name == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return IPCTrainerInitInfo(rank=rank, packed=True)
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    from vllm.utils.network_utils import get_open_port

    # Only rank 0 and the engine's workers meet, on this machine: the engine is a child of rank 0.
    workers = engine.config.tensor_parallel_size if engine is not None else 0
    port = get_open_port() if engine is not None else 0
    return NCCLTrainerInitInfo(master_address="127.0.0.1", master_port=port, world_size=1 + workers, rank=rank)


def push_weights(transport: "TrainerWeightTransferEngine", engine: Engine | None, version: int) -> None:
    """Send the trainer's weights; the engine then serves policy ``version``. Called on every trainer rank.

    Raises:
        EngineError: on rank 0, when the engine refused or died. It then serves nothing until it is restarted and
            synced; the other ranks return normally, so agree on success before the next collective.
    """
    if engine is not None:
        engine.announce_version(version)
    transport.send_weights()
