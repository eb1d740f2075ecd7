"""Shard Hugging Face tensors into a Megatron parameter of each tensor-parallel rank, and back.

Pure functions on tensors without collectives. Both directions use the same plan of slices.
"""

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

from megatron_espo.errors import InputError

if TYPE_CHECKING:  # settings are checked before torch is imported
    import torch


class ShardLayout(Enum):
    """Order of the Hugging Face tensors (sources) in a parameter, and how TP shards it."""

    REPLICATED = "replicated"
    """Equal on every rank."""
    COLUMN = "column"
    """Sharded along dimension 0 (output features)."""
    ROW = "row"
    """Sharded along dimension 1 (input features)."""
    VOCAB = "vocab"
    """Sharded along dimension 0, after padding with zero rows to equal shards."""
    QKV = "qkv"
    """Query, key, value, interleaved by query group (q … q k v | q … q k v), sharded along
    dimension 0."""
    GATED = "gated"
    """Gate and up projection: a rank has its rows of the gate, then its rows of the other."""

    FUSED_GATED = "fused_gated"
    """One source with the rows of the gate, then of the up projection; sharded as ``GATED``."""

    @property
    def dim(self) -> int:
        """The sharded dimension."""
        return 1 if self is ShardLayout.ROW else 0

    @property
    def num_sources(self) -> int:
        """Number of Hugging Face tensors in one parameter."""
        return {ShardLayout.QKV: 3, ShardLayout.GATED: 2}.get(self, 1)


def _plan(
    layout: ShardLayout,
    extents: Sequence[int],
    local_extent: int,
    rank: int,
    tp_size: int,
    query_groups: int,
) -> Iterator[tuple[int, int, int, int]]:
    """Map slices of the sources to slices of a rank's shard, along ``layout.dim``.

    Args:
        layout: layout of the parameter.
        extents: size of each source.
        local_extent: size of a shard.
        rank: tensor-parallel rank.
        tp_size: number of ranks.
        query_groups: number of key/value heads. If it does not divide by ``tp_size``, a shard ends
            inside a group, as in Megatron.

    Yields:
        (index of the source, start, offset, length): ``source[start : start + length]`` is
        ``shard[offset : offset + length]``.
    """
    if layout is ShardLayout.FUSED_GATED:
        half = extents[0] // 2
        sizes = (half, half), local_extent, rank, tp_size, query_groups
        for source, start, offset, length in _plan(ShardLayout.GATED, *sizes):
            yield 0, source * half + start, offset, length
        return
    if layout is ShardLayout.REPLICATED:
        rank, tp_size = 0, 1
    blocks = {ShardLayout.QKV: query_groups, ShardLayout.GATED: tp_size}.get(layout, 1)
    assert all(extent % blocks == 0 for extent in extents), (layout, extents, blocks)
    assert sum(extents) <= tp_size * local_extent, (layout, extents, tp_size, local_extent)
    position = 0
    for block in range(blocks):
        for source, extent in enumerate(extents):
            start, stop = block * extent // blocks, (block + 1) * extent // blocks
            while start < stop:
                owner, offset = divmod(position, local_extent)
                length = min(stop - start, local_extent - offset)
                if owner == rank:
                    yield source, start, offset, length
                start, position = start + length, position + length


def local_shape(
    layout: ShardLayout, shapes: Sequence[Sequence[int]], tp_size: int, padded_vocab: int = 0
) -> tuple[int, ...]:
    """Shape of one rank's shard.

    Args:
        layout: layout of the parameter.
        shapes: shapes of its sources.
        tp_size: number of ranks.
        padded_vocab: rows of the padded embedding, for the vocab layout.

    Raises:
        InputError: the parameter does not divide by ``tp_size``.
    """
    shape = list(shapes[0])
    shape[layout.dim] = sum(s[layout.dim] for s in shapes)
    if layout is ShardLayout.REPLICATED:
        return tuple(shape)
    if layout is ShardLayout.VOCAB:
        shape[0] = max(shape[0], padded_vocab)
    is_gated = layout in (ShardLayout.GATED, ShardLayout.FUSED_GATED)  # gate, and as many rows
    features = shape[layout.dim] // (2 if is_gated else 1)
    if features % tp_size:
        size = f"{layout.value} weights of {features} features"
        raise InputError(f"{size} do not divide by {tp_size} ranks")
    shape[layout.dim] //= tp_size
    return tuple(shape)


def shard_into(
    local: "torch.Tensor",
    sources: Sequence[Any],
    layout: ShardLayout,
    rank: int,
    tp_size: int,
    query_groups: int = 1,
) -> None:
    """Fill one rank's shard in place. Reads only its part of each source; casts to its dtype.

    Args:
        local: the shard, of shape ``local_shape``, any dtype and device. Padding rows become zero.
        sources: tensors, or slices of a safetensors file (``safe_open(...).get_slice(name)``).
        layout: layout of the parameter.
        rank: tensor-parallel rank.
        tp_size: number of tensor-parallel ranks.
        query_groups: number of key/value heads.
    """
    shapes = [s.get_shape() if hasattr(s, "get_shape") else s.shape for s in sources]
    extents = [shape[layout.dim] for shape in shapes]
    if layout is ShardLayout.VOCAB:
        local.zero_()
    sizes = extents, local.shape[layout.dim], rank, tp_size, query_groups
    for source, start, offset, length in _plan(layout, *sizes):
        rows = slice(start, start + length)
        part = sources[source][(slice(None), rows) if layout.dim else rows]
        local.narrow(layout.dim, offset, length).copy_(part)


def unshard_into(
    outputs: "Sequence[torch.Tensor]",
    part: "torch.Tensor",
    layout: ShardLayout,
    rank: int,
    tp_size: int,
    query_groups: int = 1,
    *,
    first_row: int = 0,
    local_rows: int | None = None,
) -> None:
    """Copy one rank's shard into the whole Hugging Face tensors. Casts to their dtype.

    The inverse of ``shard_into``: the shards of all ranks fill the tensors.

    Args:
        outputs: one whole tensor per source. Padding rows of a vocabulary are dropped.
        part: the shard, or some of its rows.
        layout: layout of the parameter.
        rank: tensor-parallel rank.
        tp_size: number of tensor-parallel ranks.
        query_groups: number of key/value heads.
        first_row: index in the shard of the first row of ``part``.
        local_rows: rows of the shard; default: those of ``part``.
    """
    extents = [output.shape[layout.dim] for output in outputs]
    local_extent = part.shape[1] if layout.dim else local_rows or len(part)
    sizes = extents, local_extent, rank, tp_size, query_groups
    end = first_row + len(part)
    for source, start, offset, length in _plan(layout, *sizes):
        output = outputs[source]
        if layout.dim:
            rows = output[first_row:end].narrow(1, start, length)
            rows.copy_(part.narrow(1, offset, length))
            continue
        first, last = max(offset, first_row), min(offset + length, end)
        if first < last:
            shift = start - offset
            output[first + shift : last + shift].copy_(part[first - first_row : last - first_row])
