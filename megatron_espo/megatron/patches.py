"""Run-time changes to Megatron-Core and torch. ``distributed/cpu.py`` has those for a CPU.

A function's docstring gives the reason. Its entry in ``PATCHES`` names the releases that it is for,
and checks whether the installed release still needs it.
"""

import functools
import importlib
import inspect
import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist


class Patch(NamedTuple):
    """A patch of this module.

    Attributes:
        name: the function that applies it.
        version: releases that it was written for.
        module, source: the patch is needed while the module's source contains this text.
    """

    name: str
    version: str
    module: str
    source: str

    def is_needed(self) -> bool:
        """Whether the installed release still has the code that the patch changes."""
        return self.source in inspect.getsource(importlib.import_module(self.module))


PATCHES: list[Patch] = []


def _patch(module: str, source: str, version: str = "Megatron-Core 0.19") -> Callable:
    """Register the decorated function in ``PATCHES``."""

    def register(function: Callable) -> Callable:
        PATCHES.append(Patch(function.__name__, version, module, source))
        return function

    return register


@_patch("megatron.core.dist_checkpointing.strategies.filesystem_async", "ctx.Manager().Queue()")
def keep_checkpoint_results_in_process() -> None:
    """Collect the results of checkpoint writers in a queue of this process.

    Megatron starts a process for this queue. That process outlives a killed rank and makes scripts
    need a ``__main__`` guard. A save that waits for its writers does not need it.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.SimpleQueue()


def optimizer_parts(optimizer: Any) -> list[Any]:
    """Return the optimizers that Megatron's optimizer chains, or the optimizer itself."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


@_patch("megatron.core.optimizer.distrib_optimizer", "dst_tensors[key].copy_(tensors[key])")
def prepare_adam_for_loading(optimizer: Any) -> None:
    """Give torch's Adam its state before Megatron loads into it, and keep its step counts.

    The state does not exist before the first step. Megatron loads ``step`` with the parameter
    groups and leaves it out of the tensors, but then looks for it there. Apex and Transformer
    Engine have optimizers without this state.
    """
    for part in optimizer_parts(optimizer):
        if not hasattr(part, "_init_optimizer_states_with_dummy_values"):
            continue  # not a distributed optimizer
        if not part.optimizer.state:
            part._init_optimizer_states_with_dummy_values()
        if any("step" in state for state in part.optimizer.state.values()):
            part._set_main_param_and_optimizer_states = functools.partial(_set_states, part)


def _set_states(part: Any, parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
    step = part._get_main_param_and_optimizer_states(parameter)["step"]
    type(part)._set_main_param_and_optimizer_states(part, parameter, tensors | {"step": step})


@_patch("megatron.core.optimizer.distrib_optimizer", 's["step"] = step\n')
def separate_adam_steps(optimizer: Any) -> None:
    """Give every parameter its own step count after loading.

    Megatron assigns one tensor to all parameters, and torch's Adam increments it once for each.
    """
    for part in optimizer_parts(optimizer):
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


@_patch("megatron.core.parallel_state", 'backend="gloo"')
@contextmanager
def fake_process_groups(rank: int, world_size: int) -> Iterator[None]:
    """Initialize torch's ``fake`` process groups, whose collectives return at once.

    Megatron asks for gloo groups, which would connect to other ranks, and its optimizer gathers
    objects, which fake groups cannot. Here every group is fake, and every rank has the same object.
    """
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    create = parallel_state.create_group

    def create_group(*args: Any, backend: str | None = None, **options: Any) -> Any:
        return create(*args, **options)

    def all_gather_object(objects: list, own: Any, group: Any = None) -> None:
        objects[:] = [own] * len(objects)

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    with (
        mock.patch.object(parallel_state, "create_group", create_group),
        mock.patch.object(dist, "all_gather_object", all_gather_object),
    ):
        yield
