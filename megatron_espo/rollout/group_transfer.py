"""What our transports for CPUs have in common: groups of tensors in a block of memory, described by offsets and checksums.

The sender maps an anonymous memory file (``memfd_create``): it has no name, so nothing is left in /dev/shm whatever dies, and the 64 MB that
containers give /dev/shm is no limit. One gather group (a decoder layer) at a time is written, described by offsets and checksums, and loaded.
Groups take turns at the block's two ends, so that the next is gathered while one is loaded; the block holds the two largest neighbours.
How the bytes come from there to the workers is each transport's own.
"""

import secrets
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import prod
from typing import Self

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

from megatron_espo.collectives import first_answer
from megatron_espo.rollout.block import SharedBlock
from megatron_espo.rollout.reloading import forget_expert_kernels, repack_tied_head

_ALIGNMENT = 64  # bytes; every dtype's view starts on a cache line


@dataclass
class GroupInitInfo(WeightTransferInitInfo):
    """Worker side: ``capacity`` in bytes of its block, and what every sync will bring."""

    capacity: int
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


@dataclass
class GroupUpdateInfo(WeightTransferUpdateInfo):
    """One group: positions in the announced manifest, byte offsets in the block, ``byte_sum`` of each tensor."""

    positions: list[int]
    offsets: list[int]
    checksums: list[int]

    def stop(self, manifest: Sequence[ParamMeta]) -> int:
        """Where its bytes end in the block."""
        return max(offset + num_bytes(manifest[position]) for position, offset in zip(self.positions, self.offsets, strict=True))


class GroupReceiver(WeightTransferEngine[GroupInitInfo, GroupUpdateInfo]):
    """Worker side. Errors leave the model half loaded: the engine must be restarted."""

    update_info_cls = GroupUpdateInfo

    _block: SharedBlock | None = None
    seconds: Counter[str]

    @abstractmethod
    def _attach(self, init_info: GroupInitInfo) -> SharedBlock:
        """The block in which groups will lie."""

    def _fetch(self, size: int) -> None:
        """Bring the ``size`` bytes of the next group into the block, where they are not there already."""

    def init_transfer_engine(self, init_info: GroupInitInfo) -> None:
        self.shutdown()
        self._block = self._attach(init_info)
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

    def receive_weights(self, update_info: GroupUpdateInfo) -> None:
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

        for position in update_info.positions:
            if position in self._arrived:
                raise ValueError(f"transfer: weight {self._manifest[position].name!r} arrived twice in one sync.")
        self._fetch(update_info.stop(self._manifest))
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


class GroupSender(TrainerWeightTransferEngine[TrainerInitInfo]):
    """Trainer side. ``send_weights`` runs on every trainer rank; collectives are the source's, and in the first sync ``_connect``'s.

    A source with a method ``use_memory`` (``MegatronWeightSource``) gathers straight into the shared block; with a
    ``lockstep`` and all its ranks on this machine each writes its own shards there, and nothing is gathered.
    """

    _block: SharedBlock | None = None
    _is_connected = False

    @classmethod
    def trainer_init(
        cls,
        init_info: TrainerInitInfo,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource | None = None,
    ) -> Self:
        if source is None:
            raise ValueError(f"The {init_info.backend} transport needs a WeightSource.")
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        if engine.is_sender:
            engine._open(init_info, source.metadata(), source.groups())
        return engine

    @abstractmethod
    def _introduce(self, init_info: TrainerInitInfo, largest: int, manifest: dict[str, list]) -> None:
        """Tell the workers where groups will come from (``client.init_weight_transfer_engine``).

        Args:
            largest: bytes of the largest group.
            manifest: ``names``, ``dtype_names`` and ``shapes`` of a ``GroupInitInfo``.
        """

    def _deliver(self, info: GroupUpdateInfo) -> None:
        """Have the workers load a group that lies in the block. Runs in a thread, while the next group is gathered."""
        self.client.update_weights(asdict(info))

    def _open(self, init_info: TrainerInitInfo, metas: list[ParamMeta], groups: list[list[str]]) -> None:
        self._manifest = metas
        self._metas = {meta.name: (i, meta) for i, meta in enumerate(metas)}
        sizes = [sum(_aligned(num_bytes(self._metas[name][1])) for name in names) for names in groups]
        capacity = max(map(sum, zip(sizes, [*sizes[1:], 0], strict=True)))
        self._block = SharedBlock.create(capacity)
        self._executor = ThreadPoolExecutor(1, "weight-sync")
        self.seconds: Counter[str] = Counter()
        manifest = {
            "names": [meta.name for meta in metas],
            "dtype_names": [str(meta.dtype).removeprefix("torch.") for meta in metas],
            "shapes": [list(meta.shape) for meta in metas],
        }
        self._introduce(init_info, max(sizes), manifest)

    def _connect(self) -> None:
        """Let the source write into the block. Once, on every rank; with a ``lockstep`` a broadcast and an all-reduce over all."""
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
            is_shared = first_answer(None if has_same else "elsewhere") is None
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
                info = self._write(names, tensors) if error is None else None
            except Exception as problem:
                error = problem
            error = self._wait(pending) or error
            if error is None:
                pending = self._executor.submit(self._deliver, info)
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

    def _write(self, names: Iterable[str], tensors: Iterable[torch.Tensor | None]) -> GroupUpdateInfo:
        began, items = time.perf_counter(), []
        for name, tensor in zip(names, tensors, strict=True):
            position, meta = self._metas[name]
            _check_tensor(meta, tensor)
            items.append((position, meta, tensor))
        if not self._block.holds(items[0][2]):
            items = self._copy(items)
        info = GroupUpdateInfo([], [], [])
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
            f"Weight {meta.name!r} is not held by the sending rank; this transport needs a source that yields every tensor on rank 0."
        )
    if tuple(tensor.shape) != tuple(meta.shape) or tensor.dtype != meta.dtype:
        raise ValueError(
            f"Weight {meta.name!r} was announced as {meta.dtype} {tuple(meta.shape)}, "
            f"got {tensor.dtype} {tuple(tensor.shape)}."
        )
