"""Run an unmodified Megatron-Core on a machine without CUDA.

For Megatron-Core 0.19 and torch 2.8 and newer. Megatron-Core passes the device ``cuda`` in
many places. Without CUDA, :func:`install` redirects these to the CPU: a ``TorchFunctionMode``
changes device arguments, and the ``torch.cuda`` functions that Megatron calls are replaced. The
change holds for the whole process, so the rollout engine runs in another process. With CUDA
:func:`install` does nothing, which is also the check that the replacements are needed.
"""

from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def _is_cuda(device: Any) -> bool:
    # For torch an integer device is a CUDA device number. A bool is an int, but never a device.
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


class _CudaToCpu(TorchFunctionMode):
    """Replaces ``device="cuda"`` by the CPU and reports CUDA names for the types of CPU tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # Every operation passes here, so the common case is short.
        if func is torch.Tensor.cuda:
            return args[0]
        kwargs = dict(kwargs) if kwargs else {}
        if kwargs:
            kwargs.pop("pin_memory", None)  # pinning needs an accelerator
            if "device" in kwargs and _is_cuda(kwargs["device"]):
                kwargs["device"] = _CPU
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # distrib_optimizer.py sorts parameters by this string and accepts CUDA names only.
            return result.replace("torch.", "torch.cuda.", 1)
        return result


class _Stream:
    """A CUDA stream or event that does nothing: work on a CPU is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self) -> "_Stream":
        return self

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None


@cache
def install() -> bool:
    """Redirect ``torch.cuda`` to the CPU in this process if there is no CUDA. Idempotent.

    Call it before importing ``megatron``.

    Returns:
        Whether the redirection is active.
    """
    if torch.cuda.is_available():
        return False
    _replace_functions()
    _CudaToCpu().__enter__()
    return True


def _to_numpy(tensor: Any, as_numpy: bool = False, **kwargs: Any) -> Any:
    """Convert token counts for gloo's all-to-all. Megatron converts CUDA tensors only."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _gather_rows(gather):
    """Wrap Megatron's gather of different numbers of rows: gloo gathers equal shapes only."""

    def gather_along_first_dim(input_, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        most = max(output_split_sizes)
        padded = input_.new_zeros(most, *input_.shape[1:])
        padded[: len(input_)] = input_
        gathered = gather(padded, group).view(group.size(), most, *input_.shape[1:])
        parts = zip(gathered, output_split_sizes, strict=True)
        return torch.cat([rows[:size] for rows, size in parts])

    return gather_along_first_dim


def _replace_functions() -> None:
    def get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    replacements = {
        "current_device": lambda: _CPU,
        "synchronize": lambda *args: None,
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "Stream": _Stream,
        "Event": type("Event", (_Stream,), {}),  # torch.compile refuses one object under two names
        "current_stream": lambda *args: _Stream(),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)

    # Megatron's random number tracker, expert gather and dispatcher do not go through torch.cuda.
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer.moe import token_dispatcher

    random._get_cuda_rng_state = get_rng_state
    random._set_cuda_rng_state = set_rng_state
    mappings._gather_along_first_dim = _gather_rows(mappings._gather_along_first_dim)
    token_dispatcher.maybe_move_tensor_to_cpu = _to_numpy
