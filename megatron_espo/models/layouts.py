"""Shard Hugging Face tensors into a Megatron parameter of each tensor-parallel rank, and back.

Pure functions on tensors without collectives. Both directions use the same plan of slices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Slice:
    """``source[start : start + length]`` is ``shard[offset : offset + length]`` of ``rank``.

    Both ranges are along the sharded dimension.
    """

    source: int
    start: int
    rank: int
    offset: int
    length: int


def plan_slices(
    layout: ShardLayout, extents: Sequence[int], tp_size: int, query_groups: int, local_extent: int
) -> list[Slice]:
    """Map slices of the sources to slices of the ranks' shards.

    Args:
        layout: layout of the parameter.
        extents: size of each source along ``layout.dim``.
        tp_size: number of ranks.
        query_groups: number of key/value heads. If it does not divide by ``tp_size``, a shard ends
            inside a group, as in Megatron.
        local_extent: size of a shard along ``layout.dim``.
    """
    if layout is ShardLayout.FUSED_GATED:
        half, gated = extents[0] // 2, ShardLayout.GATED
        slices = plan_slices(gated, (half, half), tp_size, query_groups, local_extent)
        return [replace(s, source=0, start=s.source * half + s.start) for s in slices]
    if layout is ShardLayout.REPLICATED:
        tp_size = 1
    blocks = {ShardLayout.QKV: query_groups, ShardLayout.GATED: tp_size}.get(layout, 1)
    assert all(extent % blocks == 0 for extent in extents), (layout, extents, blocks)
    slices, position = [], 0
    for block in range(blocks):
        for source, extent in enumerate(extents):
            start, stop = block * extent // blocks, (block + 1) * extent // blocks
            while start < stop:
                rank, offset = divmod(position, local_extent)
                length = min(stop - start, local_extent - offset)
                slices.append(Slice(source, start, rank, offset, length))
                start, position = start + length, position + length
    assert position <= tp_size * local_extent, (layout, extents, tp_size, local_extent)
    return slices


def local_shape(
    layout: ShardLayout,
    shapes: Sequence[Sequence[int]],
    tp_size: int,
    padded_vocab: int | None = None,
) -> tuple[int, ...]:
    """Shape of one rank's shard.

    Args:
        layout: layout of the parameter.
        shapes: shapes of its sources.
        tp_size: number of ranks.
        padded_vocab: rows of the padded embedding; only for the vocab layout.

    Raises:
        InputError: the parameter does not divide by ``tp_size``.
    """
    shape = list(shapes[0])
    shape[layout.dim] = sum(s[layout.dim] for s in shapes)
    if layout is ShardLayout.REPLICATED:
        return tuple(shape)
    if layout is ShardLayout.VOCAB and padded_vocab is not None:
        assert padded_vocab >= shape[0], (padded_vocab, shape)
        shape[0] = padded_vocab
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
    for piece in plan_slices(layout, extents, tp_size, query_groups, local.shape[layout.dim]):
        if piece.rank == rank or layout is ShardLayout.REPLICATED:
            rows = slice(piece.start, piece.start + piece.length)
            part = sources[piece.source][(slice(None), rows) if layout.dim else rows]
            local.narrow(layout.dim, piece.offset, piece.length).copy_(part)


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
    extents = tuple(output.shape[layout.dim] for output in outputs)
    local_extent = part.shape[1] if layout.dim else local_rows or len(part)
    for piece in plan_slices(layout, extents, tp_size, query_groups, local_extent):
        if piece.rank != rank and layout is not ShardLayout.REPLICATED:
            continue
        output = outputs[piece.source]
        end = first_row + len(part)
        if layout.dim:
            rows = output[first_row:end].narrow(1, piece.start, piece.length)
            rows.copy_(part.narrow(1, piece.offset, piece.length))
            continue
        start, stop = max(piece.offset, first_row), min(piece.offset + piece.length, end)
        if start < stop:
            shift = piece.start - piece.offset
            output[start + shift : stop + shift].copy_(part[start - first_row : stop - first_row])
