"""Lets an unmodified Megatron-Core run on a machine without CUDA.

Megatron-Core names the device ``cuda`` in a few dozen places. On a machine without one, :func:`install` answers those
places with the CPU: a ``TorchFunctionMode`` redirects device arguments, and the few ``torch.cuda`` functions that Megatron
calls get stand-ins. It changes torch for the whole process, so the rollout engine lives in another process. It must be called
before ``megatron`` is imported; on a machine with CUDA it does nothing.
"""

import contextlib
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_mode: TorchFunctionMode | None = None


def _names_cuda(device: Any) -> bool:
    # A bare integer device means "CUDA device number" to torch (bool is an int, but never a device).
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return str(device).startswith("cuda") if isinstance(device, str | torch.device) else False


class _CudaMeansCpu(TorchFunctionMode):
    """Redirects ``device="cuda"`` to the CPU and reports CPU tensors under the type names Megatron's optimizer compares."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)  # without an accelerator there is nothing to pin for
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        answer = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # distrib_optimizer.py sorts parameters by this string and knows only the CUDA ones.
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer


class _NoStream:
    """Stands for a CUDA stream or event: everything on a CPU is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self, *args: Any) -> "_NoStream":
        return self

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None


def install() -> bool:
    """Make ``torch.cuda`` mean the CPU in this process, where there is no CUDA. Idempotent.

    Returns:
        Whether the stand-ins are active.
    """
    global _mode
    if torch.cuda.is_available():
        return False
    if _mode is None:
        _replace_cuda_functions()
        _mode = _CudaMeansCpu()
        _mode.__enter__()
    return True


def _always(answer: Any = None):
    """A new function with one answer. New each time: torch.compile refuses one object under two names in ``torch.cuda``."""
    return lambda *args, **kwargs: answer() if callable(answer) else answer


def _to_numpy(tensor: Any, as_numpy: bool = False, **kwargs: Any) -> Any:
    """Numbers of tokens as gloo's all-to-all takes them; Megatron converts only what comes from a GPU."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _gather_rows(gather):
    """Megatron's gather of different numbers of rows (tokens of experts that ranks share): gloo gathers equal shapes only."""

    def gather_along_first_dim(input_, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        most = max(output_split_sizes)
        padded = input_.new_zeros(most, *input_.shape[1:])
        padded[: len(input_)] = input_
        gathered = gather(padded, group).view(group.size(), most, *input_.shape[1:])
        return torch.cat([rows[:size] for rows, size in zip(gathered, output_split_sizes, strict=True)])

    return gather_along_first_dim


def _replace_cuda_functions() -> None:
    def get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    stand_ins = {
        "current_device": _always(_CPU),
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "_lazy_call": lambda function, **kwargs: function(),
        "Stream": type("Stream", (_NoStream,), {}),
        "Event": type("Event", (_NoStream,), {}),
        "nvtx": SimpleNamespace(range_push=_always(), range_pop=_always(), range=_always(contextlib.nullcontext)),
    }
    stand_ins |= {name: _always() for name in ("synchronize", "set_device", "empty_cache")}
    stand_ins |= {name: _always(_NoStream) for name in ("current_stream", "default_stream")}
    stand_ins |= {name: _always(contextlib.nullcontext) for name in ("stream", "device")}
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)

    # Megatron reaches below torch.cuda for its random number tracker.
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer.moe import token_dispatcher

    random._get_cuda_rng_state = get_rng_state
    random._set_cuda_rng_state = set_rng_state
    mappings._gather_along_first_dim = _gather_rows(mappings._gather_along_first_dim)
    token_dispatcher.maybe_move_tensor_to_cpu = _to_numpy
