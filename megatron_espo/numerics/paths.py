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


def choose(path: Path, logits: Tensor) -> Path:
    """Resolve ``"auto"`` from the device and the number of elements alone, so that equal runs take equal paths."""
    if path not in ("auto", "torch", "compiled", "triton"):
        raise ValueError(f"path must be 'auto', 'torch', 'compiled' or 'triton', got {path!r}")
    double = logits.dtype == torch.float64
    if path == "triton" and double:
        raise ValueError("the Triton path computes in float32; use path='torch' for float64 logits")
    if path != "auto":
        return path
    if double:
        return "torch"
    if logits.is_cuda:
        return "triton" if _have_triton() else "torch"
    if logits.device.type == "cpu" and logits.numel() >= COMPILE_FROM and _have_cpp_compiler():
        return "compiled"
    return "torch"


def statistics(path: Path, logits: Tensor, columns: int, local_target: Tensor, scale: float) -> Tensor:
    """``[tokens, 4]``; see :func:`megatron_espo.numerics.torch_path.statistics`."""
    if path == "triton":
        from megatron_espo.numerics import triton_path

        return triton_path.statistics(logits, columns, local_target, scale)[0]
    return torch_path.statistics(logits, columns, local_target, scale, compiled=path == "compiled")


def gradient(
    path: Path, logits: Tensor, out: Tensor, columns: int, local_target: Tensor, terms: Tensor, scale: float, entropy: bool
) -> None:
    """Writes ``out``; see :func:`megatron_espo.numerics.torch_path.gradient`."""
    if path == "triton":
        from megatron_espo.numerics import triton_path

        triton_path.gradient(logits, out, columns, local_target, terms, scale, entropy)
        return
    torch_path.gradient(logits, out, columns, local_target, terms, scale, entropy, compiled=path == "compiled")
