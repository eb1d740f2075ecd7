"""What keeps a bad step away from the weights: gradients out of line, and memory that ran out."""

import statistics
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

_LEAST_NORMS = 10


class SpikeGuard:
    """Refuses an update whose gradient norm is far above the recent ones.

    Args:
        factor: how many times the median; ``None``: nothing is refused.
        window: latest norms that are looked at.

    Attributes:
        norms: those of the updates made; part of a checkpoint.
    """

    def __init__(self, factor: float | None, window: int) -> None:
        self.factor, self.norms = factor, deque(maxlen=window)

    def refuse(self, norm: float) -> str | None:
        """Why the update is not to be made; else the norm is remembered."""
        if len(self.norms) >= min(_LEAST_NORMS, self.norms.maxlen):
            median = statistics.median(self.norms)
            if norm > self.factor * median:
                return f"norm {norm:.4g} is above optimizer.spike_factor {self.factor:g} times the median {median:.4g} of the last {len(self.norms)}"
        self.norms.append(norm)
        return None


class OutOfMemory(RuntimeError):
    """A rank's memory did not suffice for its micro-batches; the message names the settings that change that."""


@contextmanager
def naming_the_knob(megatron, optimizer) -> Iterator[None]:
    """Turn an allocation that fails inside into :class:`OutOfMemory`, with the setting that matters where it failed.

    Args:
        megatron, optimizer: sections of the configuration.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        cause = str(error).strip().partition("\n")[0] or "out of memory"
        raise OutOfMemory(f"rank {dist.get_rank()} is out of memory {_advice(error, megatron, optimizer)} ({cause})") from error


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's allocator has an exception type of its own, the CPU's has not."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _advice(error: BaseException, megatron, optimizer) -> str:
    frame, files = error.__traceback__, set()
    while frame is not None:
        files.add(frame.tb_frame.f_code.co_filename.replace("\\", "/"))
        frame = frame.tb_next
    smaller = f"lower megatron.max_tokens_per_micro_batch ({megatron.max_tokens_per_micro_batch})"
    if any("/megatron_espo/numerics/" in file for file in files):
        budget = megatron.head_memory_mib
        way_out = f"in the output layer: {'lower' if budget else 'set'} megatron.head_memory_mib ({budget or 'null'}), or {smaller}"
    elif any("/core/optimizer/" in file for file in files):
        way_out = f"in the optimizer: use more ranks with optimizer.use_distributed_optimizer ({str(optimizer.use_distributed_optimizer).lower()})"
    else:
        granularity = megatron.recompute_granularity or "null"
        way_out = f"in the layers: {smaller}" + ("" if granularity == "full" else f", or set megatron.recompute_granularity ({granularity}) to full")
    return f"{way_out}; `megatron-espo plan` tells what takes how much"
