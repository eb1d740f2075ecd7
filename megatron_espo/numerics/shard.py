"""One rank's columns of the vocabulary, and the collectives over tensor-parallel ranks."""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_espo.numerics import torch_path
from megatron_espo.numerics.statistics import merge

Path = Literal["auto", "torch", "compiled", "triton"]
# On a CPU a compilation takes seconds, and pays off from this number of logits on.
COMPILE_FROM = 1 << 24


def choose_path(path: Path, like: Tensor, elements: int) -> Path:
    """Resolve ``auto`` from device and dtype of ``like`` and the number of logits alone.

    Equal runs therefore take equal paths.
    """
    if path not in get_args(Path):
        raise ValueError(f"path must be one of {', '.join(get_args(Path))}, got {path!r}")
    double = like.dtype == torch.float64
    if path == "triton" and double:
        raise ValueError("path='triton' computes in float32; use path='torch' for float64 logits")
    if path != "auto":
        return path
    if double:
        return "torch"
    if like.is_cuda:
        return "triton"
    return "compiled" if elements >= COMPILE_FROM else "torch"


class Shard:
    """The columns of the vocabulary that a rank holds.

    Args:
        width: columns, padding included.
        group: tensor-parallel process group; ``None``: this rank has the whole vocabulary.
        vocab_size: the true vocabulary; ``None``: every column of every rank.
        temperature: the sampling temperature.
        path: implementation, from :func:`choose_path`.

    Attributes:
        size: ranks of the group.
        columns: how many leading columns are true vocabulary.
        scale: 1/temperature.

    Raises:
        ValueError: a temperature or a size of the vocabulary that is impossible.
    """

    def __init__(
        self,
        width: int,
        group: dist.ProcessGroup | None,
        vocab_size: int | None,
        temperature: float,
        path: Path,
    ) -> None:
        self.group, self.size = group, 1 if group is None else group.size()
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        total = width * self.size
        if vocab_size is not None and not 0 < vocab_size <= total:
            raise ValueError(f"vocab_size must lie in 1..{total} (all columns), got {vocab_size}")
        self.scale = 1.0 / temperature
        is_compiled = path == "compiled"
        self._statistics: Callable = partial(torch_path.statistics, compiled=is_compiled)
        self._gradient: Callable = partial(torch_path.gradient, compiled=is_compiled)
        if path == "triton":
            from megatron_espo.numerics import triton_path

            self._statistics, self._gradient = triton_path.statistics, triton_path.gradient
        self._first = 0 if group is None else group.rank() * width
        true = width if vocab_size is None else vocab_size - self._first
        self.columns = min(max(true, 0), width)

    def statistics(
        self, logits: Tensor, targets: Tensor, store: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Sums of :mod:`megatron_espo.numerics.statistics` over this shard.

        Args:
            logits: ``[tokens, width]``, not changed.
            targets: ``[tokens]`` int64 global token ids.
            store: ``[tokens, width]`` of a narrower dtype: receives the logits minus the maximum of
                their tile of columns.

        Returns:
            ``(m, a, b, y)`` as ``[tokens, 4]``, float32 (float64 for float64 logits), and with
            ``store`` the maxima ``[tokens, tiles]``.
        """
        local = self._local(targets)
        result: tuple[Tensor, Tensor | None] = self._statistics(
            logits, self.columns, self.scale, local, store
        )
        return result

    def gradient(
        self,
        source: Tensor,
        out: Tensor,
        targets: Tensor,
        sums: Tensor,
        grad_logprob: Tensor | None,
        grad_entropy: Tensor | None,
        tile_max: Tensor | None = None,
    ) -> None:
        """Write the gradient of the logits into ``out``; padded columns get exactly 0.

        Args:
            source: ``[tokens, width]`` logits, or with ``tile_max`` what :meth:`statistics` stored.
            out: ``[tokens, width]``; may be ``source`` itself.
            targets: ``[tokens]`` int64 global token ids.
            sums: ``[tokens, 4]`` of :meth:`merge`.
            grad_logprob, grad_entropy: ``[tokens]``; ``None``: 0.
        """
        grads = grad_logprob, grad_entropy
        local = self._local(targets)
        self._gradient(source, out, self.columns, local, sums, *grads, self.scale, tile_max)

    def _local(self, targets: Tensor) -> Tensor:
        """Contiguous columns of this shard; outside ``[0, columns)`` where it lacks the target."""
        return targets - self._first if self._first else targets.contiguous()

    def local_columns(self, cells: Tensor) -> Tensor:
        """Of ``cells [2, n]`` (row, global token id) those of this shard, as row and column."""
        columns = cells[1] - self._first
        return torch.stack((cells[0], columns))[:, (columns >= 0) & (columns < self.columns)]

    def merge(self, stats: Tensor) -> Tensor:
        """``(m, a, b, y)`` of the whole vocabulary from ``stats [tokens, 4]``: one all-gather."""
        parts = stats.unsqueeze(0)
        if self.size > 1 and stats.numel():
            parts = stats.new_empty(self.size, *stats.shape)
            all_gather(parts.flatten(0, 1), stats, self.group)
        return merge(parts, self.scale, dim=0)


# torch 2.13 renamed both collectives.


def all_gather(out: Tensor, part: Tensor, group: dist.ProcessGroup | None) -> None:
    """``out`` = every rank's ``part`` along the first dimension."""
    run = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    run(out, part, group=group)


def reduce_scatter(out: Tensor, whole: Tensor, group: dist.ProcessGroup | None) -> dist.Work:
    """Start ``out`` = this rank's rows of the sum of every rank's ``whole``."""
    run = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return run(out, whole, group=group, async_op=True)


def check_targets(targets: Tensor, tokens: int) -> None:
    """Raise ValueError unless there is one id for each of ``tokens``."""
    if targets.shape != (tokens,) or targets.dtype != torch.int64:
        got = f"{targets.dtype} {list(targets.shape)}"
        raise ValueError(f"targets must be int64 [{tokens}], got {got}")
