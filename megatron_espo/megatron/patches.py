"""Run-time changes to Megatron-Core 0.19. ``distributed/cpu.py`` has those for a CPU.

A function's docstring gives the reason. ``tests/test_patches.py`` checks that the installed release
still needs each of them.
"""

import functools
import math
import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_espo.distributed import runtime


def keep_checkpoint_results_in_process() -> None:
    """Collect the results of checkpoint writers in a queue of this process.

    Megatron starts a process for this queue. That process outlives a killed rank and makes scripts
    need a ``__main__`` guard. Writers that are threads do not need it.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.SimpleQueue()


def optimizer_parts(optimizer: Any) -> list[Any]:
    """Return the optimizers that Megatron's optimizer chains, or the optimizer itself."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


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


def keep_configured_settings(optimizer: Any, saved: Any) -> None:
    """Write the optimizer's learning rates, betas and eps into a state that it will load.

    Megatron finds a saved parameter group by a key that contains the learning rates, so a run with
    another rate could not load it. Betas and eps would be those of the saved state.
    """
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    settings = ("max_lr", "min_lr", "betas", "eps")
    names = [name for name in param_group_identifier_keys if name not in settings]
    parts = optimizer_parts(optimizer)
    states = [saved] if len(parts) == 1 else saved
    if isinstance(states, dict):
        states = [state for _, state in sorted(states.items())]
    for part, state in zip(parts, states, strict=True):
        for group in state.get("optimizer", state)["param_groups"]:
            for own in part.param_groups:
                if all(own.get(name) == group.get(name) for name in names):
                    group.update({name: own[name] for name in settings if name in own})


def separate_adam_steps(optimizer: Any) -> None:
    """Give every parameter its own step count after loading.

    Megatron assigns one tensor to all parameters, and torch's Adam increments it once for each.
    """
    for part in optimizer_parts(optimizer):
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


def save_optimizer_shards(optimizer: Any) -> None:
    """Let every data-parallel rank save its own shard of the state in ``fully_reshardable`` format.

    Megatron gathers the whole state in the host memory of every data-parallel rank before a save.
    The checkpoint has the same tensors here, in other pieces, and is loaded by the same code.
    """
    for part in optimizer_parts(optimizer):
        if hasattr(part, "sharded_param_state_fully_reshardable"):
            part.sharded_param_state_fully_reshardable = functools.partial(_own_shards, part)


def _own_shards(
    part: Any, model_state: Any, is_loading: bool = False, metadata: Any = None
) -> dict[Any, Any]:
    """Return this rank's shards of a distributed optimizer's state as Megatron's ShardedTensors."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    if is_loading:
        original = type(part).sharded_param_state_fully_reshardable
        return original(part, model_state, is_loading, metadata)
    entries = nested_values(extract_sharded_tensors_and_factories(model_state)[0])
    by_param = {entry.data: entry for entry in entries}
    found: dict[int, ShardedTensor] = {}
    for param in part.model_param_gbuf_map:
        tensors, entry = part._get_main_param_and_optimizer_states(param), by_param[param]
        start = part._get_model_param_range_map(param)["param"].start
        # Every data-parallel rank has other elements: none of them is a replica.
        replica = (*entry.replica_id[:2], part.distributed_optimizer_instance_id)
        for name in ("param", *part.optimizer_state_keys):
            shard, key = tensors[name].detach().float(), f"optimizer.state.{name}.{entry.key}"
            whole = torch.empty(entry.data.shape, dtype=shard.dtype, device="meta")
            changes = {"key": key, "data": whole, "replica_id": replica}
            if isinstance(entry, ShardedTensorFactory):
                pieces = list(nested_values(replace(entry, **changes).build()))
            else:
                pieces = [replace(entry, dtype=shard.dtype, **changes)]
            for piece in pieces:
                assert piece.data.is_contiguous(), piece.key
                begin = piece.data.storage_offset()  # of the piece in the flat parameter
                low = max(begin, start) - begin
                high = min(begin + piece.data.numel(), start + shard.numel()) - begin
                shape = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
                for offset, size in _boxes(low, high, shape) if low < high else ():
                    count = math.prod(size)
                    data = shard.flatten()[begin + low - start :][:count].view(size)
                    low += count
                    place = map(sum, zip(piece.global_offset, offset, strict=True))
                    found[len(found)] = replace(
                        piece,
                        data=data,
                        local_shape=size,
                        global_offset=tuple(place),
                        axis_fragmentations=None,
                        prepend_axis_num=0,
                    )
    return found


Box = tuple[tuple[int, ...], tuple[int, ...]]


def _boxes(start: int, stop: int, shape: Sequence[int]) -> Iterator[Box]:
    """Cut elements ``start`` to ``stop`` of a flat tensor into boxes ``(offset, size)``, in order.

    At most two for each dimension but the last.
    """
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    while start < stop:
        index, within = divmod(start, row)
        rows = (stop - start) // row
        if within == 0 and rows:
            yield (index, *(0,) * len(shape[1:])), (rows, *shape[1:])
            start += rows * row
        else:
            end = min(stop - index * row, row)
            for offset, size in _boxes(within, end, shape[1:]):
                yield (index, *offset), (1, *size)
            start = index * row + end


@contextmanager
def fake_process_groups(rank: int, world_size: int, sizes: dict[str, Any]) -> Iterator[Any]:
    """Yield Megatron's process groups as ``rank`` of ``world_size`` sees them, with parallel
    ``sizes``. They are torch's ``fake`` groups, whose collectives return at once.

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
        try:
            yield runtime.initialize(**sizes).groups
        finally:
            runtime.shutdown()
