"""Skip gradient spikes, and name the setting to change when memory runs out."""

import statistics
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

# The median is of the last 50 norms; the guard needs at least 10 of them.
SPIKE_WINDOW, LEAST_NORMS = 50, 10


class SpikeGuard:
    """Detects a gradient norm far above the recent ones.

    Args:
        factor: limit, as a multiple of the median; ``None``: no limit.

    Attributes:
        norms: the norms of the last updates that were made; part of a checkpoint.
    """

    def __init__(self, factor: float | None) -> None:
        self.factor = factor
        self.norms: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def check(self, norm: float) -> str | None:
        """Return why to skip the update, or record the norm and return ``None``."""
        if self.factor is not None and len(self.norms) >= LEAST_NORMS:
            median = statistics.median(self.norms)
            if norm > self.factor * median:
                return (
                    f"norm {norm:.4g} is above optimizer.spike_factor {self.factor:g} times the "
                    f"median {median:.4g} of the last {len(self.norms)}"
                )
        self.norms.append(norm)
        return None


class OutOfMemory(RuntimeError):
    """A rank ran out of memory. The message names the settings to change."""


@contextmanager
def oom_hint(megatron: Any, optimizer: Any) -> Iterator[None]:
    """Turn a failed allocation into :class:`OutOfMemory`.

    Args:
        megatron, optimizer: sections of the configuration.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # CUDA's allocator has its own exception type, the CPU's has not.
        is_oom = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not is_oom and "can't allocate memory" not in str(error):
            raise
        cause = str(error).strip().partition("\n")[0] or "out of memory"
        advice = _advice(error, megatron, optimizer)
        raise OutOfMemory(
            f"rank {dist.get_rank()} is out of memory {advice}; `megatron-espo plan` prints what "
            f"takes how much ({cause})"
        ) from error


def _advice(error: BaseException, megatron: Any, optimizer: Any) -> str:
    """Return the setting that matters for the code in which the allocation failed."""
    files = {frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)}
    smaller = f"lower megatron.max_tokens_per_micro_batch ({megatron.max_tokens_per_micro_batch})"
    if any("/megatron_espo/numerics/" in file for file in files):
        budget = megatron.head_memory_mib
        setting = f"megatron.head_memory_mib ({budget or 'null'})"
        return f"in the output layer: {'lower' if budget else 'set'} {setting}, or {smaller}"
    if any("/core/optimizer/" in file for file in files):
        value = str(optimizer.use_distributed_optimizer).lower()
        return (
            f"in the optimizer: use more ranks with optimizer.use_distributed_optimizer ({value})"
        )
    granularity = megatron.recompute_granularity or "null"
    if granularity == "full":
        return f"in the layers: {smaller}"
    recompute = f"set megatron.recompute_granularity ({granularity}) to full"
    return f"in the layers: {smaller}, or {recompute}"
