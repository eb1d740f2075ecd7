"""A block of memory that the processes of one machine share."""

import mmap
import os
import weakref
from typing import Self

import torch

from megatron_espo.rollout.checksum import byte_sum


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
