"""vLLM weight transport ``shared_memory``: trainer to engine on one machine, through memory and without a GPU.

The sender maps an anonymous memory file (``memfd_create``) that the engine's workers open through ``/proc``. It has no
name, so nothing is left in /dev/shm whatever dies, and the 64 MB that containers give /dev/shm is no limit. One gather
group (a decoder layer) at a time is written, described by offsets and checksums, and loaded. Groups take turns at the
block's two ends, so that the next is gathered while one is loaded; the block holds the two largest neighbours. Importing
this module registers both sides with vLLM's factories.
"""

import mmap
import os
import secrets
import time
import weakref
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

from megatron_espo.rollout.checksum import byte_sum

BACKEND = "shared_memory"
_ALIGNMENT = 64  # bytes; every dtype's view starts on a cache line


@dataclass
class SharedMemoryTrainerInitInfo(TrainerInitInfo):
    """Trainer side: rank 0 sends, all ranks iterate the source."""

    backend: ClassVar[str] = BACKEND


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Worker side: where the block is (``path``, ``capacity`` in bytes) and what every sync will bring."""

    path: str
    capacity: int
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """One group: positions in the announced manifest, byte offsets in the block, ``byte_sum`` of each tensor."""

    positions: list[int]
    offsets: list[int]
    checksums: list[int]


class SharedBlock:
    """A shared mapping of ``capacity`` bytes; ``bytes`` is a uint8 tensor over it."""

    def __init__(self, fd: int, capacity: int):
        self._close_fd = weakref.finalize(self, os.close, fd)
        self.path = f"/proc/{os.getpid()}/fd/{fd}"
        self.mapping = mmap.mmap(fd, capacity)
        self.bytes = torch.frombuffer(self.mapping, dtype=torch.uint8)

    @classmethod
    def create(cls, capacity: int) -> Self:
        """A new anonymous block; it is freed when the last process that maps it ends."""
        fd = os.memfd_create("megatron_espo_weights")
        os.ftruncate(fd, capacity)
        return cls(fd, capacity)

    @classmethod
    def attach(cls, path: str, capacity: int) -> Self:
        """The block that another process of this user created."""
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC), capacity)

    @classmethod
    def attach_if_here(cls, path: str, capacity: int, start: bytes) -> Self | None:
        """The block of a process that may run on another machine; None unless the one at ``path`` begins with ``start``."""
        try:
            block = cls.attach(path, capacity)
        except (OSError, ValueError):
            return None
        if block.mapping[: len(start)] == start:
            return block
        block.close()
        return None

    def checksum(self, offset: int, size: int) -> int:
        return byte_sum(memoryview(self.mapping), offset, size)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's memory is the block's."""
        return 0 <= tensor.data_ptr() - self.bytes.data_ptr() < self.bytes.numel()

    def close(self) -> None:
        self._close_fd()
        del self.bytes, self.mapping  # the memory goes with the last tensor that views it


class SharedMemoryWeightTransferEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """Worker side. Errors leave the model half loaded: the engine must be restarted."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    _block: SharedBlock | None = None
    seconds: Counter[str]

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        self.shutdown()
        self._block = SharedBlock.attach(init_info.path, init_info.capacity)
        self._manifest = [
            ParamMeta(name, getattr(torch, dtype), tuple(shape))
            for name, dtype, shape in zip(init_info.names, init_info.dtype_names, init_info.shapes, strict=True)
        ]

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        self._arrived: set[int] = set()
        self.seconds = Counter()
        forget_expert_kernels(self.model)
        initialize_layerwise_reload(self.model)
        self._layers = [get_layerwise_info(layer) for layer in self.model.modules() if layer._parameters]

    def update_weights(self, update_info: dict) -> None:
        # The base class ends with torch.accelerator.synchronize(), which raises without an accelerator; everything
        # here is synchronous with the host.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

        items = zip(update_info.positions, update_info.offsets, update_info.checksums, strict=True)
        weights = [self._read(*item) for item in items]
        began = time.perf_counter()
        try:
            with disable_mtp_completeness_check():
                self.model.load_weights(weights)
        except Exception as error:
            names = f"{weights[0][0]} ... {weights[-1][0]}"
            raise RuntimeError(f"vLLM could not load {names}: {type(error).__name__}: {error}") from error
        self._copy_what_waits()
        self.seconds["load"] += time.perf_counter() - began

    def _read(self, position: int, offset: int, checksum: int) -> tuple[str, torch.Tensor]:
        began = time.perf_counter()
        meta = self._manifest[position]
        if position in self._arrived:
            raise ValueError(f"transfer: weight {meta.name!r} arrived twice in one sync.")
        size = num_bytes(meta)
        if (found := self._block.checksum(offset, size)) != checksum:
            raise ValueError(
                f"transfer: weight {meta.name!r} arrived damaged: checksum {found:016x}, sent {checksum:016x}."
            )
        self._arrived.add(position)
        self.seconds["checksum"] += time.perf_counter() - began
        return meta.name, self._block.bytes[offset : offset + size].view(meta.dtype).view(meta.shape)

    def _copy_what_waits(self) -> None:
        # vLLM's loaders keep a tensor until its whole layer is there; a later group overwrites the block.
        for info in self._layers:
            for _, bound in info.loaded_weights:
                for name, value in bound.arguments.items():
                    if isinstance(value, torch.Tensor) and self._block.holds(value):
                        bound.arguments[name] = value.clone()

    def missing_weights(self) -> list[str]:
        """Announced names that have not arrived in this update."""
        return [meta.name for i, meta in enumerate(self._manifest) if i not in self._arrived]

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        if missing := self.missing_weights():
            raise ValueError(f"transfer: {len(missing)} announced weights did not arrive: {', '.join(missing[:5])}.")
        began = time.perf_counter()
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_head(self.model, self.model_config)
        self.seconds["finish"] += time.perf_counter() - began

    def shutdown(self) -> None:
        if self._block is not None:
            self._block.close()
            self._block = None


def forget_expert_kernels(model: torch.nn.Module) -> None:
    """Have vLLM build the kernels of experts again when it has loaded their weights; call it before.

    On a CPU a layer of experts computes with padded and packed weights, and vLLM packs them only where it builds the
    kernel, not where it reloads: the kernel would take the new weights for packed ones.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    for layer in model.modules():
        if isinstance(method := getattr(layer, "quant_method", None), UnquantizedFusedMoEMethod):
            method.moe_kernel = None


def repack_tied_head(model: torch.nn.Module, model_config) -> None:
    """Renew the packed copy that a tied output layer computes with on a CPU.

    It shares the embedding's weight, but vLLM's layerwise reload repacks only the layers that received tensors: logits
    would come from old weights.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    if model_config.hf_text_config.tie_word_embeddings:
        for layer in model.modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)


class SharedMemoryTrainerWeightTransferEngine(TrainerWeightTransferEngine[SharedMemoryTrainerInitInfo]):
    """Trainer side. ``send_weights`` runs on every trainer rank; collectives are the source's, and in the first sync ``_connect``'s.

    A source with a method ``use_memory`` (``MegatronWeightSource``) gathers straight into the shared block; with a
    ``lockstep`` and all its ranks on this machine each writes its own shards there, and nothing is gathered.
    """

    init_info_cls = SharedMemoryTrainerInitInfo

    _block: SharedBlock | None = None
    _is_connected = False

    @classmethod
    def trainer_init(
        cls,
        init_info: SharedMemoryTrainerInitInfo,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource | None = None,
    ) -> Self:
        if source is None:
            raise ValueError("The shared_memory transport needs a WeightSource.")
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        if engine.is_sender:
            engine._open(source.metadata(), source.groups())
        return engine

    def _open(self, metas: list[ParamMeta], groups: list[list[str]]) -> None:
        self._metas = {meta.name: (i, meta) for i, meta in enumerate(metas)}
        sizes = [sum(_aligned(num_bytes(self._metas[name][1])) for name in names) for names in groups]
        capacity = max(map(sum, zip(sizes, [*sizes[1:], 0], strict=True)))
        self._block = SharedBlock.create(capacity)
        self._executor = ThreadPoolExecutor(1, "weight-sync")
        self.seconds: Counter[str] = Counter()
        init_info = SharedMemoryInitInfo(
            path=self._block.path,
            capacity=capacity,
            names=[meta.name for meta in metas],
            dtype_names=[str(meta.dtype).removeprefix("torch.") for meta in metas],
            shapes=[list(meta.shape) for meta in metas],
        )
        self.client.init_weight_transfer_engine(asdict(init_info))

    def _connect(self) -> None:
        """Let the source write into the block. Once, on every rank; with a ``lockstep`` a broadcast and a gather over all."""
        self._is_connected, is_shared = True, False
        if (lockstep := getattr(self.source, "lockstep", None)) is not None:
            lockstep.meet("the shared memory")
            proof = secrets.token_bytes(_ALIGNMENT)
            box = [None]
            if self.is_sender:
                self._block.bytes[:_ALIGNMENT] = torch.frombuffer(bytearray(proof), dtype=torch.uint8)
                box = [(self._block.path, self._block.bytes.numel(), proof)]
            dist.broadcast_object_list(box, src=0)
            if not self.is_sender:
                self._block = SharedBlock.attach_if_here(*box[0])
            # Another sender has an engine and a block of its own: each has to gather then.
            has_same = dist.get_rank() == 0 or (not self.is_sender and self._block is not None)
            here: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(here, has_same)
            is_shared = all(here)
        if hasattr(self.source, "use_memory") and (self.is_sender or is_shared):
            self.source.use_memory(self._take, is_shared)

    def send_weights(self) -> None:
        """One full sync: start, one update per group, finish.

        An error of the engine is raised after the source is exhausted: the other ranks are inside its collectives.
        """
        self._taken = 0
        if not self._is_connected:
            self._connect()
        if not self.is_sender:
            for _ in self.source.iter_groups():
                pass
            return
        pending = self._executor.submit(self.client.start_weight_update)
        error: Exception | None = None
        for names, tensors in self.source.iter_groups():
            # The group before the last is loaded, so this half of the block is free; the last is being loaded meanwhile.
            try:
                info = asdict(self._write(names, tensors)) if error is None else None
            except Exception as problem:
                error = problem
            error = self._wait(pending) or error
            if error is None:
                pending = self._executor.submit(self.client.update_weights, info)
        if error := error or self._wait(pending):
            raise error
        self.client.finish_weight_update()

    def _wait(self, pending: Future) -> Exception | None:
        began = time.perf_counter()
        error = pending.exception()
        self.seconds["wait"] += time.perf_counter() - began
        return error

    def _take(self, size: int) -> torch.Tensor:
        """``size`` bytes for the next group: even ones at the block's start, odd ones at its end."""
        offset = 0 if self._taken % 2 == 0 else (self._block.bytes.numel() - size) // _ALIGNMENT * _ALIGNMENT
        self._taken += 1
        return self._block.bytes[offset : offset + size]

    def _write(self, names: Iterable[str], tensors: Iterable[torch.Tensor | None]) -> SharedMemoryUpdateInfo:
        began, items = time.perf_counter(), []
        for name, tensor in zip(names, tensors, strict=True):
            position, meta = self._metas[name]
            _check_tensor(meta, tensor)
            items.append((position, meta, tensor))
        if not self._block.holds(items[0][2]):
            items = self._copy(items)
        info = SharedMemoryUpdateInfo([], [], [])
        for position, meta, tensor in items:
            place = tensor.data_ptr() - self._block.bytes.data_ptr()
            info.positions.append(position)
            info.offsets.append(place)
            info.checksums.append(self._block.checksum(place, num_bytes(meta)))
        self.seconds["write"] += time.perf_counter() - began
        return info

    def _copy(self, items: list[tuple[int, ParamMeta, torch.Tensor]]) -> list[tuple[int, ParamMeta, torch.Tensor]]:
        """The same items, their tensors in the block."""
        sizes = [_aligned(num_bytes(meta)) for _, meta, _ in items]
        copies = []
        for (position, meta, tensor), room in zip(items, self._take(sum(sizes)).split(sizes), strict=True):
            copy = room[: num_bytes(meta)].view(meta.dtype).view(meta.shape)
            copies.append((position, meta, copy.copy_(tensor.detach())))
        return copies

    def shutdown(self) -> None:
        if self.is_sender:
            self._executor.shutdown()
        if hasattr(self.source, "use_memory"):
            self.source.use_memory(None)
        if self._block is not None:
            self._block.close()


def num_bytes(meta: ParamMeta) -> int:
    """Size of a tensor on the wire, in bytes."""
    return prod(meta.shape) * meta.dtype.itemsize


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _check_tensor(meta: ParamMeta, tensor: torch.Tensor | None) -> None:
    if tensor is None:
        raise ValueError(
            f"Weight {meta.name!r} is not held by the sending rank; the shared_memory transport needs a source that "
            "yields every tensor on rank 0."
        )
    if tuple(tensor.shape) != tuple(meta.shape) or tensor.dtype != meta.dtype:
        raise ValueError(
            f"Weight {meta.name!r} was announced as {meta.dtype} {tuple(meta.shape)}, "
            f"got {tensor.dtype} {tuple(tensor.shape)}."
        )


WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryWeightTransferEngine)
WeightTransferTrainerFactory.register_engine(BACKEND, SharedMemoryTrainerWeightTransferEngine)
