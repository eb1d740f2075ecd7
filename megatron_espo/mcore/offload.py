"""Parts of the trainer's state that leave the device while an engine needs its memory, and come back unchanged."""

import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, UntypedStorage

from megatron_espo.mcore.optimizer import Policy

PARTS = ("optimizer", "gradients", "weights")


class Offloader:
    """Frees the device memory of parts of a policy's state, and fills it again.

    | part | what it is | its content |
    |---|---|---|
    | ``optimizer`` | Adam's moments, float32 copies of the weights | copied to the host |
    | ``gradients`` | DDP's buffers, those of experts too | dropped: ``Policy.backward`` zeroes them before it adds to them |
    | ``weights`` | the parameters, in DDP's buffers where the distributed optimizer put them | copied to the host |

    Tensors stay the objects they are: their storages shrink to nothing and grow again, so that whatever was a view (buckets of DDP's buffers,
    parameters in them, the distributed optimizer's shards) is one afterwards. Megatron-Core's own ``offload_to_cpu`` gives a float32 shard memory
    of its own instead, after which the optimizer would update weights that no layer has. To touch a part that is away is undefined; on a CPU,
    where all of this happens too, the process ends with a segmentation fault.

    What is copied has its place in host memory from the first time on, page-locked where there is CUDA.

    Args:
        policy: whose chunks and optimizer are meant; their tensors are looked up anew each time.
        parts: those of ``PARTS`` that may leave; whatever is asked about others is ignored.
    """

    def __init__(self, policy: Policy, parts: Collection[str]) -> None:
        self._policy = policy
        self._parts = {part: _Gradients() if part == "gradients" else _Copied() for part in PARTS if part in parts}

    @property
    def away(self) -> set[str]:
        """Parts that have no device memory now."""
        return {part for part, memory in self._parts.items() if memory.freed}

    @property
    def host_bytes(self) -> int:
        """Host memory that this rank keeps for what leaves."""
        return sum(memory.host_bytes for memory in self._parts.values())

    def handles(self, *parts: str) -> bool:
        """Whether one of ``parts`` may leave."""
        return not self._parts.keys().isdisjoint(parts)

    def to_host(self, *parts: str) -> None:
        """Free ``parts``, and what torch keeps of memory that nobody uses. Collective: one barrier, after which the memory is free on every rank."""
        for part in self._parts.keys() & set(parts) - self.away:
            self._parts[part].free(self._storages(part))
        torch.cuda.empty_cache()  # or this process would have what the engine needs
        dist.barrier()

    def to_device(self, *parts: str) -> None:
        """Bring ``parts`` back. Zero collectives."""
        for part in self.away & set(parts):
            self._parts[part].fill()
        torch.cuda.synchronize()

    @contextmanager
    def without(self, part: str) -> Iterator[None]:
        """Inside, ``part`` is away; afterwards it is back. Nothing where it may not leave. Collective, as :meth:`to_host`."""
        if not self.handles(part):
            yield
            return
        self.to_host(part)
        try:
            yield
        finally:
            self.to_device(part)

    def _storages(self, part: str) -> list[UntypedStorage]:
        """Those of a part, each once."""
        chunks = self._policy.chunks
        if part == "gradients":
            return _unique(buffer.grad_data for chunk in chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers)
        weights = _unique(parameter for chunk in chunks for parameter in chunk.parameters())
        if part == "weights":
            return weights
        # A float32 parameter is its own main copy.
        addresses = {storage.data_ptr() for storage in weights}
        return [storage for storage in _unique(_optimizer_tensors(self._policy.optimizer)) if storage.data_ptr() not in addresses]


def _optimizer_tensors(optimizer) -> Iterator[Tensor]:
    """Of Megatron's optimizer, or of those that it chains: what they update, and their moments."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is None:  # a rank without parameters of a kind
            continue
        yield from (parameter for group in part.optimizer.param_groups for parameter in group["params"])
        for state in part.optimizer.state.values():
            # A step count is a number, and lies on the host already.
            yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim())


def _unique(tensors: Iterable[Tensor]) -> list[UntypedStorage]:
    found = (tensor.untyped_storage() for tensor in tensors)
    return list({storage.data_ptr(): storage for storage in found if storage.nbytes()}.values())


class _Gradients:
    """Storages whose content is not kept."""

    host_bytes = 0

    def __init__(self) -> None:
        self.freed: list[tuple[UntypedStorage, int]] = []

    def free(self, storages: Sequence[UntypedStorage]) -> None:
        self.freed = [(storage, storage.nbytes()) for storage in storages]
        for storage in storages:
            storage.resize_(0)

    def fill(self) -> None:
        for storage, size in self.freed:
            storage.resize_(size)
        self.freed = []


class _Copied(_Gradients):
    """Storages whose content lies on the host meanwhile, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self._host = torch.empty(0, dtype=torch.uint8)

    @property
    def host_bytes(self) -> int:
        return self._host.numel()

    def free(self, storages: Sequence[UntypedStorage]) -> None:
        sizes = [storage.nbytes() for storage in storages]
        if sum(sizes) > self.host_bytes:  # the first time, and when Adam has made its moments
            del self._host
            self._host = _host_memory(sum(sizes))
        for storage, place in zip(storages, self._host[: sum(sizes)].split(sizes), strict=True):
            place.copy_(_bytes_of(storage), non_blocking=True)
        torch.cuda.synchronize()
        super().free(storages)

    def fill(self) -> None:
        freed = self.freed
        super().fill()
        sizes = [size for _, size in freed]
        for (storage, _), place in zip(freed, self._host[: sum(sizes)].split(sizes), strict=True):
            _bytes_of(storage).copy_(place, non_blocking=True)


def _bytes_of(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _host_memory(size: int) -> Tensor:
    """Uninitialised bytes, page-locked where there is CUDA."""
    host = torch.empty(size, dtype=torch.uint8)
    if torch.cuda.is_available():
        # torch's own page-locked memory comes in powers of two: up to twice what is asked for.
        runtime = torch.cuda.cudart()
        torch.cuda.check_error(runtime.cudaHostRegister(host.data_ptr(), size, 0))
        weakref.finalize(host, runtime.cudaHostUnregister, host.data_ptr())
    return host
