"""Megatron's real model, DDP buffers and optimizer for any rank of any world: no GPU, no peers, no memory.

The model is built by the same code as in training, on torch's ``meta`` device (shapes without data) and torch's ``fake`` process
groups (collectives that return at once). What a run will hold can then be read off instead of being computed from formulas.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from megatron_espo.mcore import cpu, runtime
from megatron_espo.weights.binding import Place, bind
from megatron_espo.weights.families import Mapping, model_groups


@dataclass(frozen=True)
class Held:
    """One Megatron parameter of a rank.

    Attributes:
        group: index into ``families.model_groups``: 0 the embedding, then the layers, last the head.
        mapping: the Hugging Face tensors it is made of.
        shape: of this rank's shard.
        sharing: global ranks that hold its shards, in tensor-parallel order.
        is_expert: whether only some of a stage's ranks have it (expert parallelism).
    """

    group: int
    mapping: Mapping
    shape: tuple[int, ...]
    sharing: tuple[int, ...]
    is_expert: bool


@dataclass(frozen=True)
class BuiltRank:
    """What one rank holds between steps.

    Attributes:
        rank: global rank.
        stage: its pipeline stage.
        held: its parameters; one for each, whatever the virtual pipeline stage.
        parameters: their elements, padding of the vocabulary included.
        parameter_bytes, gradient_bytes: the model's weights and DDP's buffers, their padding included.
        main_bytes: float32 copies of this rank's share of the weights; 0 where the weights are float32 themselves.
        adam_bytes: both moments of this rank's share.
    """

    rank: int
    stage: int
    held: tuple[Held, ...]
    parameters: int
    parameter_bytes: int
    gradient_bytes: int
    main_bytes: int
    adam_bytes: int


class _OnMeta(TorchFunctionMode):
    """Puts every tensor that names a device on ``meta``, and reports its type as Megatron's optimizer expects it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("meta")
        answer = func(*args, **kwargs)
        return answer.replace("meta.", "") if func is torch.Tensor.type and isinstance(answer, str) else answer


def _answer_for_all(answers: list, own: Any, group: Any = None) -> None:
    """``all_gather_object`` where every rank says the same; Megatron's optimizer asks whether all ranks have a kind of parameter."""
    answers[:] = [own] * len(answers)


@contextlib.contextmanager
def _fake_world(rank: int, world_size: int, sizes: dict[str, Any]) -> Iterator[Any]:
    """Megatron's process groups as ``rank`` of ``world_size`` sees them."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    create_group, all_gather_object = parallel_state.create_group, dist.all_gather_object
    # Megatron asks for gloo groups by name; there is nobody to connect to.
    parallel_state.create_group = lambda *args, backend=None, **options: create_group(*args, **options)
    dist.all_gather_object = _answer_for_all
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield runtime.initialize(**sizes).groups
    finally:
        runtime.shutdown()
        parallel_state.create_group, dist.all_gather_object = create_group, all_gather_object


def build_ranks(config: Any, hf_config: dict[str, Any], world_size: int) -> Iterator[BuiltRank]:
    """Build what the ranks of a run hold, one after the other: for every pipeline stage its first rank, and the first
    rank of each share of experts. All others hold equally much.

    It replaces torch's functions as ``cpu.install`` does and needs a process without process groups.

    Args:
        config: a run's :class:`megatron_espo.config.Config`, checked against ``hf_config`` and ``world_size``.

    Raises:
        InputError: the model and the naming table do not match (see ``weights.binding.bind``).
    """
    cpu.install()
    sizes = runtime.parallel_sizes(config.megatron)
    stage_ranks = world_size // config.megatron.pipeline_model_parallel_size
    groups = model_groups(hf_config)
    for first in range(0, world_size, stage_ranks):
        with _fake_world(first, world_size, sizes) as process_groups:
            chunks, built = _build(config, hf_config, groups, process_groups)
            shared_by = process_groups.expt_tp.size()
        yield built
        for share in range(1, config.megatron.expert_model_parallel_size):
            # Megatron counts each rank's experts from 0, so the same chunks are the other ranks' too. Ranks that share an expert
            # are neighbours.
            with _fake_world(first + share * shared_by, world_size, sizes) as process_groups:
                yield replace(built, rank=dist.get_rank(), held=tuple(_held(chunks, groups, process_groups)))


def _build(
    config: Any, hf_config: dict[str, Any], groups: list[list[Mapping]], process_groups: Any
) -> tuple[list[torch.nn.Module], BuiltRank]:
    from megatron_espo.mcore.model import Layout, build_model
    from megatron_espo.mcore.optimizer import Policy

    dtype = getattr(torch, config.model.dtype)
    with torch.device("meta"), _OnMeta():
        chunks = build_model(hf_config, Layout.of(config.megatron), process_groups, dtype=dtype, transformer_impl="local")
        held = tuple(_held(chunks, groups, process_groups))
        policy = Policy(chunks, process_groups, config.optimizer, train_steps=1)
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    buffers = [buffer for chunk in policy.chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    optimized = sum(p.numel() for group in policy.optimizer.param_groups for p in group["params"])
    in_buffers = [buffer.param_data for buffer in buffers if buffer.param_data is not None]
    return chunks, BuiltRank(
        rank=dist.get_rank(),
        stage=process_groups.pp.rank(),
        held=held,
        parameters=sum(parameter.numel() for parameter in parameters),
        parameter_bytes=sum(tensor.nbytes for tensor in in_buffers or parameters),
        gradient_bytes=sum(buffer.grad_data.nbytes for buffer in buffers),
        main_bytes=4 * optimized if dtype.itemsize < 4 else 0,
        adam_bytes=2 * 4 * optimized,
    )


def _held(chunks: list[torch.nn.Module], groups: list[list[Mapping]], process_groups: Any) -> Iterator[Held]:
    for index, bound in enumerate(bind(chunks, groups, Place.of(process_groups))):
        for mapping, parameter in bound:
            is_expert = mapping.expert is not None
            sharing = process_groups.expt_tp if is_expert else process_groups.tp
            yield Held(index, mapping, tuple(parameter.shape), tuple(dist.get_process_group_ranks(sharing)), is_expert)
