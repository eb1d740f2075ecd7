"""Which implementation computes a shard: Triton, compiled torch, or plain torch."""

import functools
import importlib.util
import shutil
from typing import Literal

import torch
from torch import Tensor

from megatron_espo.numerics import torch_path

Path = Literal["auto", "torch", "compiled", "triton"]
# Below this many elements a C++ compilation (seconds) is not worth the milliseconds it saves.
COMPILE_FROM = 1 << 24


@functools.cache
def _have_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _have_cpp_compiler() -> bool:
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def choose(path: Path, device: torch.device, dtype: torch.dtype, elements: int) -> Path:
    """Resolve ``"auto"`` from device, type and number of logits alone, so that equal runs take equal paths."""
    if path not in ("auto", "torch", "compiled", "triton"):
        raise ValueError(f"path must be 'auto', 'torch', 'compiled' or 'triton', got {path!r}")
    double = dtype == torch.float64
    if path == "triton" and double:
        raise ValueError("the Triton path computes in float32; use path='torch' for float64 logits")
    if path != "auto":
        return path
    if double:
        return "torch"
    if device.type == "cuda":
        return "triton" if _have_triton() else "torch"
    if device.type == "cpu" and elements >= COMPILE_FROM and _have_cpp_compiler():
        return "compiled"
    return "torch"


def statistics(
    path: Path, logits: Tensor, columns: int, local_target: Tensor, scale: float, store: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """``[tokens, 4]`` (see :func:`megatron_espo.numerics.torch_path.statistics`) and, with ``store``, maxima of tiles.

    ``store`` ``[tokens, width]`` of a narrower type receives the logits, each tile of columns shifted by its maximum.
    """
    if path == "triton":
        from megatron_espo.numerics import triton_path

        return triton_path.statistics(logits, columns, local_target, scale, store)
    stats = torch_path.statistics(logits, columns, local_target, scale, compiled=path == "compiled")
    if store is None:
        return stats, None
    tile_max = stats[:, 0:1].clone()
    torch_path.store_shifted(logits, tile_max, store)
    return stats, tile_max


def gradient(
    path: Path, source: Tensor, out: Tensor, columns: int, local_target: Tensor, terms: Tensor, scale: float,
    entropy: bool, tile_max: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes ``out``; ``source`` holds logits or, with ``tile_max``, what :func:`statistics` stored.

    See :func:`megatron_espo.numerics.torch_path.gradient`.
    """
    if path == "triton":
        from megatron_espo.numerics import triton_path

        triton_path.gradient(source, out, columns, local_target, terms, scale, entropy, tile_max)
        return
    if tile_max is not None:
        terms = torch.cat((terms[:, 0:1] - tile_max, terms[:, 1:]), dim=1)
    torch_path.gradient(source, out, columns, local_target, terms, scale, entropy, compiled=path == "compiled")
