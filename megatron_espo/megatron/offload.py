"""Move parts of the trainer's state to the host while an engine needs the device's memory."""

import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, UntypedStorage

from megatron_espo.megatron.patches import optimizer_parts
from megatron_espo.megatron.train_engine import TrainEngine

PARTS = ("optimizer", "gradients", "weights")


class Offloader:
    """Frees the device memory of parts of the trainer's state, and restores it.

    | part | tensors | content |
    |---|---|---|
    | ``optimizer`` | Adam's moments, float32 copies of the weights | copied to the host |
    | ``gradients`` | DDP's buffers, those of experts too | dropped (``backward`` zeroes them) |
    | ``weights`` | the parameters, in DDP's buffers with the distributed optimizer | copied |

    Tensors stay the same objects: their storages are resized to zero and back, so views (buckets of
    DDP's buffers, parameters in them, the optimizer's shards) stay views. Megatron-Core's own
    ``offload_to_cpu`` gives a float32 shard new memory, and the optimizer would then update weights
    that no layer uses. Access to an offloaded part is undefined; on a CPU, where all of this
    happens too, the process ends with a segmentation fault.

    The host memory of a part is allocated on its first move, page-locked with CUDA, and kept.

    Args:
        engine: its chunks and optimizer. Tensors are looked up on every move.
        parts: the parts of ``PARTS`` that may leave; requests for others are ignored.
    """

    def __init__(self, engine: TrainEngine, parts: Collection[str]) -> None:
        self._engine = engine
        self._parts = {part: _Part(part != "gradients") for part in PARTS if part in parts}

    @property
    def offloaded(self) -> set[str]:
        """The parts that have no device memory now."""
        return {name for name, part in self._parts.items() if part.freed}

    @property
    def host_bytes(self) -> int:
        """Host memory of this rank for offloaded parts, bytes."""
        return sum(part.host.numel() for part in self._parts.values())

    def handles(self, *parts: str) -> bool:
        """Whether one of ``parts`` may leave."""
        return not self._parts.keys().isdisjoint(parts)

    def to_host(self, *parts: str) -> None:
        """Free ``parts`` and torch's cached memory. Collective: one barrier at the end."""
        for name in self._parts.keys() & set(parts) - self.offloaded:
            self._parts[name].free(self._storages(name))
        torch.cuda.empty_cache()
        dist.barrier()

    def to_device(self, *parts: str) -> None:
        """Restore ``parts``. Zero collectives."""
        for name in self.offloaded & set(parts):
            self._parts[name].restore()
        torch.cuda.synchronize()

    @contextmanager
    def without(self, part: str) -> Iterator[None]:
        """Offload ``part`` inside, if it may leave. Collective as :meth:`to_host`."""
        self.to_host(part)
        try:
            yield
        finally:
            self.to_device(part)

    def _storages(self, part: str) -> list[UntypedStorage]:
        """Return the storages of a part, each once."""
        if part == "gradients":
            return _unique(buffer.grad_data for buffer in self._engine.buffers())
        weights = _unique(p for chunk in self._engine.chunks for p in chunk.parameters())
        if part == "weights":
            return weights
        # A float32 parameter is its own main copy.
        addresses = {storage.data_ptr() for storage in weights}
        states = _unique(_optimizer_tensors(self._engine.optimizer))
        return [storage for storage in states if storage.data_ptr() not in addresses]


def _optimizer_tensors(optimizer: Any) -> Iterator[Tensor]:
    """Yield the parameters and moments of Megatron's optimizer."""
    for part in optimizer_parts(optimizer):
        if part.optimizer is None:  # a rank without parameters of a kind
            continue
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            # A step count has no dimension, and is on the host already.
            yield from (v for v in state.values() if isinstance(v, Tensor) and v.dim())


def _unique(tensors: Iterable[Tensor]) -> list[UntypedStorage]:
    found = (tensor.untyped_storage() for tensor in tensors)
    return list({storage.data_ptr(): storage for storage in found if storage.nbytes()}.values())


class _Part:
    """Storages that are freed together.

    Args:
        is_kept: whether their content is copied to the host.

    Attributes:
        freed: the freed storages and their sizes in bytes.
        host: their content, one storage after the other.
    """

    def __init__(self, is_kept: bool) -> None:
        self.is_kept = is_kept
        self.freed: list[tuple[UntypedStorage, int]] = []
        self.host = torch.empty(0, dtype=torch.uint8)

    def free(self, storages: Sequence[UntypedStorage]) -> None:
        self.freed = [(storage, storage.nbytes()) for storage in storages]
        total = sum(size for _, size in self.freed)
        # The host memory grows on the first move, and once Adam has made its moments.
        if self.is_kept and total > self.host.numel():
            del self.host
            self.host = host_memory(total)
        for on_device, on_host in self._pairs():
            on_host.copy_(on_device, non_blocking=True)
        torch.cuda.synchronize()
        for storage in storages:
            storage.resize_(0)

    def restore(self) -> None:
        for storage, size in self.freed:
            storage.resize_(size)
        for on_device, on_host in self._pairs():
            on_device.copy_(on_host, non_blocking=True)
        self.freed = []

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the bytes of each storage and their place on the host."""
        if self.is_kept:
            sizes = [size for _, size in self.freed]
            places = self.host[: sum(sizes)].split(sizes) if sizes else ()
            for (storage, _), place in zip(self.freed, places, strict=True):
                empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
                yield empty.set_(storage), place


def host_memory(size: int) -> Tensor:
    """Return uninitialised bytes, page-locked with CUDA."""
    host = torch.empty(size, dtype=torch.uint8)
    if torch.cuda.is_available():
        # torch rounds its own page-locked memory up to a power of two.
        runtime = torch.cuda.cudart()
        torch.cuda.check_error(runtime.cudaHostRegister(host.data_ptr(), size, 0))
        weakref.finalize(host, runtime.cudaHostUnregister, host.data_ptr())
    return host
