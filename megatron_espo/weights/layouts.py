"""How Hugging Face tensors lie in a Megatron parameter, and which piece of which tensor each tensor-parallel rank has.

Pure functions on tensors; no process group, zero collectives. One plan of pieces serves both directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from megatron_espo.errors import InputError


class Layout(Enum):
    """Order of the sources in the whole parameter, and the dimension that tensor parallelism cuts."""

    REPLICATED = "replicated"
    """The same on every rank."""
    COLUMN = "column"
    """Cut along dimension 0 (output features)."""
    ROW = "row"
    """Cut along dimension 1 (input features)."""
    VOCAB = "vocab"
    """Cut along dimension 0; zero rows at the end pad the vocabulary so that every rank has equally many."""
    QKV = "qkv"
    """Query, key, value interleaved by query group: q … q k v | q … q k v | …; then cut along dimension 0."""
    GATED = "gated"
    """Every rank holds its rows of the gate, then its rows of the up projection."""

    @property
    def dim(self) -> int:
        """The dimension that is cut."""
        return 1 if self is Layout.ROW else 0


@dataclass(frozen=True)
class Piece:
    """``source[start : start + length]`` is ``shard[offset : offset + length]`` of a rank, along the cut dimension."""

    source: int
    start: int
    rank: int
    offset: int
    length: int


def plan_pieces(
    layout: Layout, extents: Sequence[int], tp_size: int, query_groups: int, local_extent: int
) -> list[Piece]:
    """Cut the sources into the pieces that the ranks' shards are made of.

    Args:
        extents: size of each source along ``layout.dim``.
        query_groups: number of key/value heads; it need not divide by ``tp_size`` (Megatron then cuts within a group).
        local_extent: size of a rank's shard along ``layout.dim``.
    """
    if layout is Layout.REPLICATED:
        tp_size = 1
    blocks = {Layout.QKV: query_groups, Layout.GATED: tp_size}.get(layout, 1)
    assert all(extent % blocks == 0 for extent in extents), (layout, extents, blocks)
    pieces, position = [], 0
    for block in range(blocks):
        for source, extent in enumerate(extents):
            start, stop = block * extent // blocks, (block + 1) * extent // blocks
            while start < stop:
                rank, offset = divmod(position, local_extent)
                length = min(stop - start, local_extent - offset)
                pieces.append(Piece(source, start, rank, offset, length))
                start, position = start + length, position + length
    assert position <= tp_size * local_extent, (layout, extents, tp_size, local_extent)
    return pieces


def local_shape(
    layout: Layout, shapes: Sequence[Sequence[int]], tp_size: int, padded_vocab: int | None = None
) -> tuple[int, ...]:
    """Shape of one rank's shard of the parameter made of sources of these shapes.

    Args:
        padded_vocab: rows of the whole embedding in Megatron, at least those of the source; vocab layout only.

    Raises:
        InputError: the parameter does not divide by ``tp_size``.
    """
    shape = list(shapes[0])
    shape[layout.dim] = sum(s[layout.dim] for s in shapes)
    if layout is Layout.REPLICATED:
        return tuple(shape)
    if layout is Layout.VOCAB and padded_vocab is not None:
        assert padded_vocab >= shape[0], (padded_vocab, shape)
        shape[0] = padded_vocab
    cut = [s[layout.dim] for s in shapes] if layout is Layout.GATED else [shape[layout.dim]]
    if any(extent % tp_size for extent in cut):
        raise InputError(f"{layout.value} weights of {cut[0]} features do not divide by {tp_size} ranks")
    shape[layout.dim] //= tp_size
    return tuple(shape)


def shard_into(
    local: torch.Tensor, sources: Sequence[Any], layout: Layout, rank: int, tp_size: int, query_groups: int = 1
) -> None:
    """Fill one rank's shard in place, reading only its own part of each source and casting to its dtype.

    Args:
        local: the shard of shape ``local_shape``, any dtype and device; padding rows are set to zero.
        sources: tensors, or slices of a safetensors file (``safe_open(...).get_slice(name)``).
    """
    extents = [_shape(source)[layout.dim] for source in sources]
    if layout is Layout.VOCAB:
        local.zero_()
    for piece in plan_pieces(layout, extents, tp_size, query_groups, local.shape[layout.dim]):
        if piece.rank == rank or layout is Layout.REPLICATED:
            start, stop = piece.start, piece.start + piece.length
            part = sources[piece.source][:, start:stop] if layout.dim else sources[piece.source][start:stop]
            local.narrow(layout.dim, piece.offset, piece.length).copy_(part)


def unshard_into(
    outputs: Sequence[torch.Tensor],
    part: torch.Tensor,
    layout: Layout,
    rank: int,
    tp_size: int,
    query_groups: int = 1,
    *,
    first_row: int = 0,
    local_rows: int | None = None,
) -> None:
    """Write what one rank's shard holds into the whole Hugging Face tensors, casting to their dtype.

    All ranks' shards together fill them: the inverse of ``shard_into``.

    Args:
        outputs: one tensor for each source, of its whole shape; a vocabulary's padding rows are dropped.
        part: the shard, or its rows from ``first_row`` on, of ``local_rows`` (default: all) in all.
    """
    extents = tuple(output.shape[layout.dim] for output in outputs)
    local_extent = part.shape[1] if layout.dim else local_rows or len(part)
    for piece in plan_pieces(layout, extents, tp_size, query_groups, local_extent):
        if piece.rank != rank and layout is not Layout.REPLICATED:
            continue
        output = outputs[piece.source]
        if layout.dim:
            columns = part[:, piece.offset : piece.offset + piece.length]
            output[first_row : first_row + len(part), piece.start : piece.start + piece.length].copy_(columns)
            continue
        start, stop = max(piece.offset, first_row), min(piece.offset + piece.length, first_row + len(part))
        if start < stop:
            shift = piece.start - piece.offset
            output[start + shift : stop + shift].copy_(part[start - first_row : stop - first_row])


def _shape(source: Any) -> Sequence[int]:
    return source.shape if isinstance(source, torch.Tensor) else source.get_shape()
