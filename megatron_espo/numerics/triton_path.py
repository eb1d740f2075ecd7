"""Statistics and gradient of a logits shard as two Triton kernels. Zero collectives.

Arithmetic is float32: float64 logits take the torch path. The kernels are bound by memory
bandwidth: forward reads every logit once; backward reads and writes each once. A program works on a
run of tiles of one row. With few rows, several programs share a row, and their parts are merged
like shards. Sums are kept per lane, so each chain of float32 additions has the length of the number
of tiles. ``TRITON_INTERPRET=1``, set before Triton is imported, runs the same kernels on CPU.

The forward kernel can also store the logits in a narrower dtype, each tile minus its own maximum.
Near the maximum, where the probability is, bfloat16 is then far more precise than for plain logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_espo.numerics.statistics import merge

_TILE = 2048  # with twice as many, Triton 3.6 spills registers on sm_90
_PROGRAMS = 1024  # several for each multiprocessor of a GPU
_STAGES = tl.constexpr(3)  # tiles in flight: the next ones load while one is reduced
_LOWEST = tl.constexpr(-1000.0)  # statistics.LOWEST
# Lowest float32: the maximum of a part that is all -inf stays finite.
_FLOOR = tl.constexpr(-3.4028234663852886e38)
# These sizes make no load wider. Unspecialized, a new value compiles no further variant.
_SIZES = ("columns", "tiles", "tiles_per_program", "logprob_stride", "entropy_stride")


@triton.jit
def _exponent(x, m, scale):
    s = (x - m) * scale
    return tl.where(s < _LOWEST, _LOWEST, s)  # unlike a maximum, NaN stays NaN


@triton.jit
def _load(row_start, column, columns, width):
    # A mask at the true vocabulary, often an odd number, would forbid 128-bit loads.
    x = tl.load(row_start + column, mask=column < width, other=-float("inf")).to(tl.float32)
    return tl.where(column < columns, x, -float("inf"))


@triton.jit(do_not_specialize=_SIZES)
def _statistics_kernel(
    logits, parts, store, tile_max, local_target, columns, width, row_stride, store_stride, tiles,
    tiles_per_program, scale, STORE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    target = tl.load(local_target + row)
    here = (split == 0) & (target >= 0) & (target < columns)
    y = tl.load(logits + row * row_stride + target, mask=here, other=-float("inf"))
    lane = tl.arange(0, TILE)
    m = tl.full((), _FLOOR, tl.float32)
    a = tl.zeros((TILE,), tl.float32)
    b = tl.zeros((TILE,), tl.float32)
    first = split * tiles_per_program
    for tile in tl.range(first, tl.minimum(first + tiles_per_program, tiles), num_stages=_STAGES):
        column = tile * TILE + lane
        x = _load(logits + row * row_stride, column, columns, width)
        top = tl.maximum(tl.max(x, 0), _FLOOR)
        if STORE:
            kept = store + row * store_stride + column
            tl.store(kept, (x - top).to(store.dtype.element_ty), mask=column < width)
            tl.store(tile_max + row * tiles + tile, top)
        new = tl.maximum(m, top)
        shift = _exponent(m, new, scale)
        weight = tl.exp(shift)
        s = _exponent(x, new, scale)
        e = tl.exp(s)
        b = weight * (b + shift * a) + s * e
        a = weight * a + e
        m = new
    part = parts + (row * tl.num_programs(1) + split) * 4
    tl.store(part, m)
    tl.store(part + 1, tl.sum(a, 0))
    tl.store(part + 2, tl.sum(b, 0))
    tl.store(part + 3, y.to(tl.float32))


@triton.jit(do_not_specialize=_SIZES)
def _gradient_kernel(
    source, tile_max, out, sums, grad_logprob, grad_entropy, local_target, columns, width,
    source_stride, out_stride, logprob_stride, entropy_stride, tiles, tiles_per_program, scale,
    LOGPROB: tl.constexpr, ENTROPY: tl.constexpr, SHIFTED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, TILE)
    m = tl.load(sums + row * 4)
    a = tl.load(sums + row * 4 + 1)
    mean = tl.load(sums + row * 4 + 2) / a
    at_y = _exponent(tl.load(sums + row * 4 + 3), m, scale)
    u = 0.0
    if LOGPROB:
        u = -scale * tl.load(grad_logprob + row * logprob_stride).to(tl.float32) / a
    v = 0.0
    if ENTROPY:
        v = -scale * tl.load(grad_entropy + row * entropy_stride).to(tl.float32) / a
    at_target = tl.exp(at_y) * (u + v * (at_y - mean)) - u * a
    target = tl.load(local_target + row)
    first = tl.program_id(1) * tiles_per_program
    for tile in tl.range(first, tl.minimum(first + tiles_per_program, tiles), num_stages=_STAGES):
        column = tile * TILE + lane
        x = _load(source + row * source_stride, column, columns, width)
        base = m
        if SHIFTED:
            base = m - tl.load(tile_max + row * tiles + tile)
        s = _exponent(x, base, scale)
        factor = u
        if ENTROPY:
            factor = u + v * (s - mean)
        grad = tl.where(column == target, at_target, tl.exp(s) * factor)
        grad = tl.where(column < columns, grad, 0.0).to(out.dtype.element_ty)
        tl.store(out + row * out_stride + column, grad, mask=column < width)


def statistics(
    logits: Tensor, columns: int, scale: float, local_target: Tensor, store: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """As :func:`megatron_espo.numerics.torch_path.statistics`; a row has several tiles."""
    tokens = logits.shape[0]
    tile, warps, tiles, per_program = _layout(logits)
    programs = triton.cdiv(tiles, per_program)
    parts = logits.new_empty(tokens, programs, 4, dtype=torch.float32)
    tile_max, stride = None, 0
    if store is not None:
        tile_max, stride = logits.new_empty(tokens, tiles, dtype=torch.float32), store.stride(0)
    if tokens:
        _statistics_kernel[(tokens, programs)](
            logits, parts, store, tile_max, local_target, columns, logits.shape[1],
            logits.stride(0), stride, tiles, per_program, scale, STORE=store is not None,
            TILE=tile, num_warps=warps if store is not None else 4,
        )  # fmt: skip
    return merge(parts, scale, dim=1), tile_max


def gradient(
    source: Tensor, out: Tensor, columns: int, local_target: Tensor, sums: Tensor,
    grad_logprob: Tensor | None, grad_entropy: Tensor | None, scale: float,
    tile_max: Tensor | None = None,
) -> None:  # fmt: skip
    """As :func:`megatron_espo.numerics.torch_path.gradient`."""
    tokens, width = source.shape
    if not tokens:
        return
    tile, warps, tiles, per_program = _layout(source)
    strides = [0 if grad is None else grad.stride(0) for grad in (grad_logprob, grad_entropy)]
    _gradient_kernel[(tokens, triton.cdiv(tiles, per_program))](
        source, tile_max, out, sums, grad_logprob, grad_entropy, local_target, columns, width,
        source.stride(0), out.stride(0), *strides, tiles, per_program, scale,
        LOGPROB=grad_logprob is not None, ENTROPY=grad_entropy is not None,
        SHIFTED=tile_max is not None, TILE=tile, num_warps=warps,
    )  # fmt: skip


def _layout(x: Tensor) -> tuple[int, int, int, int]:
    """``(columns of a tile, warps, tiles of a row, tiles of a program)``."""
    tile = min(_TILE, max(128, triton.next_power_of_2(x.shape[1])))
    tiles = triton.cdiv(x.shape[1], tile)
    programs = min(tiles, triton.cdiv(_PROGRAMS, max(x.shape[0], 1)))
    return tile, 8 if tile >= 2048 else 4, tiles, triton.cdiv(tiles, programs)
