"""Statistics and gradient of a logits shard in torch: plain, by chunks of rows, or compiled.

Both forms use the same formulas. The plain form works on a few rows at a time, so that temporaries
stay in the second-level cache. The compiled form is fused over the whole shard and sums blocks of
columns: one serial float32 sum over a peaked row loses a digit. Zero collectives.
"""

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_espo.numerics.statistics import LOWEST, accumulation_dtype, gradient_terms, merge

BLOCK = 1024  # columns of one float32 sum in the compiled form
_CHUNK = 1 << 16  # elements of a chunk of rows per thread: 256 KiB of float32
_GPU_CHUNK = 1 << 28


def statistics(
    logits: Tensor, columns: int, scale: float, local_target: Tensor, store: Tensor | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``(m, a, b, y)`` over the leading ``columns``, ``[tokens, 4]``, and the maxima of ``store``.

    See :meth:`megatron_espo.numerics.shard.Shard.statistics`. A row is one tile.
    """
    dtype = accumulation_dtype(logits.dtype)
    out = torch.empty(logits.shape[0], 4, dtype=dtype, device=logits.device)
    x = logits[:, :columns]
    if columns == 0:
        out[:, 0], out[:, 1:] = torch.finfo(dtype).min, 0.0
    elif not (compiled and _run_compiled(_blocked_statistics, x, scale, out)):
        for rows in _row_chunks(x):
            out[rows, :3] = torch.cat(_sums(x[rows].unsqueeze(1), scale), dim=1)
    here = (local_target >= 0) & (local_target < columns)
    index = local_target.clamp(0, logits.shape[1] - 1).unsqueeze(1)
    out[:, 3] = torch.where(here, logits.gather(1, index).squeeze(1).to(dtype), -torch.inf)
    if store is None:
        return out, None
    tile_max = out[:, 0:1].clone()
    for rows in _row_chunks(logits):
        store[rows] = logits[rows] - tile_max[rows]
    return out, tile_max


def gradient(
    source: Tensor, out: Tensor, columns: int, local_target: Tensor, sums: Tensor,
    grad_logprob: Tensor | None, grad_entropy: Tensor | None, scale: float,
    tile_max: Tensor | None = None, compiled: bool = False,
) -> None:  # fmt: skip
    """See :meth:`megatron_espo.numerics.shard.Shard.gradient`.

    ``local_target [tokens]`` is the target's column of this shard; elsewhere, outside
    ``[0, columns)``. Without ``grad_entropy`` each element takes one multiplication less.
    """
    terms = gradient_terms(sums, scale, grad_logprob, grad_entropy)
    out[:, columns:].zero_()
    if columns == 0:
        return
    if tile_max is not None:
        terms = torch.cat((terms[:, 0:1] - tile_max, terms[:, 1:]), dim=1)
    x, dx = source[:, :columns], out[:, :columns]
    body = _gradient_of_logprob if grad_entropy is None else _gradient_with_entropy
    if not (compiled and _run_compiled(body, x, terms, scale, dx)):
        for rows in _row_chunks(x):
            body(x[rows], terms[rows], scale, dx[rows])
    here = (local_target >= 0) & (local_target < columns)
    # Indexing, not scatter_, which copies a whole bfloat16 tensor on CPU.
    cell = torch.arange(x.shape[0], device=x.device), local_target.clamp(0, columns - 1)
    dx[cell] = torch.where(here, terms[:, 4].to(out.dtype), dx[cell])


def _row_chunks(x: Tensor) -> list[slice]:
    elements = _GPU_CHUNK if x.is_cuda else _CHUNK * min(torch.get_num_threads(), 16)
    rows = max(1, elements // x.shape[1])
    return [slice(i, i + rows) for i in range(0, x.shape[0], rows)]


def _sums(x: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(m, a, b)``, each ``[rows, blocks]``, of ``x [rows, blocks, columns]``."""
    dtype = accumulation_dtype(x.dtype)
    m = x.amax(-1, keepdim=True).to(dtype).clamp(min=torch.finfo(dtype).min)
    s = (x - m).mul_(scale).clamp_(min=LOWEST)
    e = s.exp()
    return m.squeeze(-1), e.sum(-1), s.mul_(e).sum(-1)


def _blocked_statistics(x: Tensor, scale: float, out: Tensor) -> None:
    whole = x.shape[1] // BLOCK * BLOCK
    parts = []
    if whole > 0:
        parts.append(_sums(x[:, :whole].unflatten(1, (-1, BLOCK)), scale))
    if whole < x.shape[1]:
        parts.append(_sums(x[:, whole:].unsqueeze(1), scale))
    m, a, b = (torch.cat(p, dim=1) for p in zip(*parts, strict=True))
    out.copy_(merge(torch.stack((m, a, b, m), dim=-1), scale, dim=1))  # the target's comes later


def _gradient_of_logprob(x: Tensor, terms: Tensor, scale: float, out: Tensor) -> None:
    out.copy_((x - terms[:, 0:1]).mul_(scale).exp_().mul_(terms[:, 2:3]))


def _gradient_with_entropy(x: Tensor, terms: Tensor, scale: float, out: Tensor) -> None:
    s = (x - terms[:, 0:1]).mul_(scale).clamp_(min=LOWEST)
    p = s.exp()
    out.copy_(s.sub_(terms[:, 1:2]).mul_(terms[:, 3:4]).add_(terms[:, 2:3]).mul_(p))


@functools.cache
def _compiled(body: Callable) -> Callable:
    return torch.compile(body, dynamic=True, fullgraph=True)


_broken: list[Callable] = []


def _run_compiled(body: Callable, x: Tensor, *args: Tensor | float) -> bool:
    """Run the compiled form; False where it does not compile (and one warning per process).

    Also False for one row or less than two blocks of columns: torch.compile specializes on sizes 0
    and 1, and such shards are too small to need it.
    """
    rows, columns = x.shape[:2]
    if _broken or rows < 2 or columns < 2 * BLOCK:
        return False
    # The scale is passed as a tensor: a new temperature must not compile again.
    tensors = (torch.tensor(a, dtype=torch.float64) if isinstance(a, float) else a for a in args)
    try:
        # The default is 8: a function has one form for each dtype, stride and kind of tail.
        with torch._dynamo.config.patch(recompile_limit=64):
            _compiled(body)(x, *tensors)
        return True
    except Exception as error:  # any error of the compiler: no C++ compiler, read-only cache
        _broken.append(body)
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        warnings.warn(
            f"torch.compile failed ({reason}); log-prob and entropy run in plain torch, slower",
            stacklevel=2,
        )
        return False
