"""Statistics and gradient of a logits shard in torch: plain (row chunks that stay in the cache) or compiled.

One set of formulas serves both. Plain torch runs them on a few rows at a time, so that temporaries never leave the
second-level cache; compiled, they run on the whole shard, fused. Sums are cut into blocks of columns: a serial float32
sum over a peaked row loses a digit. Zero collectives.
"""

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_espo.numerics.statistics import LOWEST, merge

BLOCK = 1024  # columns of one float32 sum in the compiled path
_CHUNK = 1 << 16  # elements per thread of a row chunk in the plain path: 256 KiB of float32
_CHUNK_CUDA = 1 << 24


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, but float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def statistics(logits: Tensor, columns: int, local_target: Tensor, scale: float, compiled: bool = False) -> Tensor:
    """Statistics of one shard.

    Args:
        logits: ``[tokens, width]``, not changed.
        columns: how many leading columns are true vocabulary.
        local_target: ``[tokens]`` int64, the target's column in this shard; outside ``[0, columns)`` if it is not here.
        scale: 1/temperature.

    Returns:
        ``[tokens, 4]`` ``(m, a, b, y)``, float32 (float64 for float64 logits).
    """
    dtype = accumulation_dtype(logits.dtype)
    out = torch.empty(logits.shape[0], 4, dtype=dtype, device=logits.device)
    x = logits[:, :columns]
    if columns == 0:
        out[:, 0], out[:, 1:3] = torch.finfo(dtype).min, 0.0
    elif not (compiled and _run_compiled(_blocked_statistics, x, scale, out)):
        for rows in _row_chunks(x):
            out[rows, 0:1], out[rows, 1:2], out[rows, 2:3] = _sums(x[rows].unsqueeze(1), scale)
    here = (local_target >= 0) & (local_target < columns)
    if columns == 0:
        out[:, 3] = -torch.inf
    else:
        target_logit = x.gather(1, local_target.clamp(0, columns - 1).unsqueeze(1)).squeeze(1).to(dtype)
        out[:, 3] = torch.where(here, target_logit, -torch.inf)
    return out


def gradient(
    logits: Tensor, out: Tensor, columns: int, local_target: Tensor, terms: Tensor, scale: float, entropy: bool,
    compiled: bool = False,
) -> None:  # fmt: skip
    """Write the gradient of the shard's logits into ``out`` (which may be ``logits`` itself).

    Args:
        terms: ``[tokens, 5]`` from :func:`~megatron_espo.numerics.statistics.gradient_terms`.
        entropy: whether the entropy takes part; without it one multiplication per element is saved.
        The rest as in :func:`statistics`. Padded columns get exactly 0.
    """
    out[:, columns:].zero_()
    if columns == 0:
        return
    x, dx = logits[:, :columns], out[:, :columns]
    body = _gradient_with_entropy if entropy else _gradient_of_logprob
    if not (compiled and _run_compiled(body, x, terms, scale, dx)):
        for rows in _row_chunks(x):
            body(x[rows], terms[rows], scale, dx[rows])
    here = (local_target >= 0) & (local_target < columns)
    # Indexing, not scatter_: that one copies a whole bfloat16 tensor on CPU.
    cell = torch.arange(x.shape[0], device=x.device), local_target.clamp(0, columns - 1)
    dx[cell] = torch.where(here, terms[:, 4].to(out.dtype), dx[cell])


def store_shifted(logits: Tensor, shift: Tensor, store: Tensor) -> None:
    """``store = logits - shift`` (``shift [tokens, 1]``), rounded to the type of ``store``."""
    for rows in _row_chunks(logits):
        store[rows] = logits[rows] - shift[rows]


def _row_chunks(x: Tensor) -> list[slice]:
    elements = _CHUNK_CUDA if x.is_cuda else _CHUNK * min(torch.get_num_threads(), 16)
    rows = max(1, elements // x.shape[1])
    return [slice(i, i + rows) for i in range(0, x.shape[0], rows)]


def _shifted(x: Tensor, shift: Tensor, scale: float | Tensor) -> Tensor:
    # In place where `x` was converted anyway: in plain torch every pass over the chunk counts.
    s = x - shift if x.dtype == shift.dtype else x.to(shift.dtype).sub_(shift)
    return s if isinstance(scale, float) and scale == 1.0 else s.mul_(scale)


def _sums(x: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(m, a, b)`` over the last dimension of ``[rows, blocks, columns]``, each ``[rows, blocks]``."""
    dtype = accumulation_dtype(x.dtype)
    m = x.amax(-1, keepdim=True).to(dtype).clamp(min=torch.finfo(dtype).min)
    s = _shifted(x, m, scale).clamp_(min=LOWEST)
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
    out[:, :3] = torch.stack(merge(m, a, b, scale, dim=1), dim=1)


def _gradient_of_logprob(x: Tensor, terms: Tensor, scale: float, out: Tensor) -> None:
    out.copy_(_shifted(x, terms[:, 0:1], scale).exp_().mul_(terms[:, 2:3]))


def _gradient_with_entropy(x: Tensor, terms: Tensor, scale: float, out: Tensor) -> None:
    s = _shifted(x, terms[:, 0:1], scale).clamp_(min=LOWEST)
    p = s.exp()
    out.copy_(s.sub_(terms[:, 1:2]).mul_(terms[:, 3:4]).add_(terms[:, 2:3]).mul_(p))


@functools.cache
def _compiled(body: Callable) -> Callable:
    return torch.compile(body, dynamic=True, fullgraph=True)


_broken: list[Callable] = []


def _run_compiled(body: Callable, *args: Tensor | float) -> bool:
    """Run the compiled form; False (with one warning per process) where this machine cannot compile."""
    if _broken:
        return False
    try:
        # The scale goes in as a tensor: a new temperature must not compile anew.
        _compiled(body)(*(torch.tensor(arg, dtype=torch.float64) if isinstance(arg, float) else arg for arg in args))
        return True
    except Exception as error:  # whatever the compiler stack raises: no C++ compiler, wrong version, read-only cache
        _broken.append(body)
        warnings.warn(
            f"torch.compile failed ({type(error).__name__}: {str(error).splitlines()[0]}); log-prob and entropy run in "
            "plain torch: the same numbers, slower",
            stacklevel=2,
        )
        return False
