"""The head's three matrix products, all by the vendor's library, with float32 results of narrower operands."""

import functools

import torch
from torch import Tensor


@functools.cache
def wide_products(device_type: str) -> bool:
    """Whether ``torch.mm`` multiplies bfloat16 into float32 on this device (CUDA, torch >= 2.8)."""
    if device_type != "cuda":
        return False
    probe = torch.ones(16, 16, dtype=torch.bfloat16, device=device_type)
    try:
        torch.mm(probe, probe, out_dtype=torch.float32)
    except (TypeError, RuntimeError):  # NotImplementedError is a RuntimeError
        return False
    return True


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b``; ``out`` may be float32 where ``a`` and ``b`` are narrower."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif wide_products(a.device.type):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def accumulate(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a @ b`` with ``out`` float32 and the sum rounded once, even where ``a`` and ``b`` are narrower."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif out.dtype == torch.float32 and wide_products(a.device.type):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    elif a.is_cuda:  # an older torch: the product of each chunk is rounded before it is added
        out.add_(a @ b)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))
