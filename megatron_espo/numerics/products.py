"""The head's three matrix products, all by the vendor's library, with float32 results of narrower operands."""

import torch
from torch import Tensor


def wide_products(device_type: str) -> bool:
    """Whether ``torch.mm`` multiplies bfloat16 into float32 on this device (CUDA, torch >= 2.8)."""
    return device_type == "cuda" and "dtype_out" in torch.ops.aten.mm.overloads()


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
