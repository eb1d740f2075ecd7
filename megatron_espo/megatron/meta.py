"""Build Megatron's model, DDP buffers and optimizer of any rank without GPUs, peers or memory.

The code is that of training, on torch's ``meta`` device (shapes without data) and ``fake`` process
groups (collectives that return at once). A plan reads sizes from the result.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from megatron_espo.config import Config
from megatron_espo.distributed import cpu, runtime
from megatron_espo.megatron.patches import fake_process_groups
from megatron_espo.models.mapping import ParamMapping
from megatron_espo.models.spec import ModelSpec
from megatron_espo.weights.binding import ShardRanks, bind


@dataclass(frozen=True)
class ParamShard:
    """One Megatron parameter of a rank.

    Attributes:
        group: index into ``ModelSpec.groups``: embedding, layers, head.
        mapping: its Hugging Face tensors.
        shape: of this rank's shard.
        sharing: global ranks that hold its shards, in tensor-parallel order.
    """

    group: int
    mapping: ParamMapping
    shape: tuple[int, ...]
    sharing: tuple[int, ...]


@dataclass(frozen=True)
class BuiltRank:
    """What one rank holds between steps.

    Attributes:
        rank: global rank.
        stage: its pipeline stage.
        held: its parameters, of all its virtual pipeline stages.
        parameters: number of elements, with the padding of the vocabulary.
        parameter_bytes, gradient_bytes: the model's weights and DDP's buffers, with their padding.
        main_bytes: float32 copies of this rank's share of the weights; 0 for float32 weights.
        adam_bytes: both moments of this rank's share.
    """

    rank: int
    stage: int
    held: tuple[ParamShard, ...]
    parameters: int
    parameter_bytes: int
    gradient_bytes: int
    main_bytes: int
    adam_bytes: int


class _OnMeta(TorchFunctionMode):
    """Creates tensors on ``meta`` and reports their type as Megatron's optimizer expects it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("meta")
        result = func(*args, **kwargs)
        is_name = func is torch.Tensor.type and isinstance(result, str)
        return result.replace("meta.", "") if is_name else result


def build_ranks(config: Config, spec: ModelSpec, world_size: int) -> Iterator[BuiltRank]:
    """Build the first rank of every pipeline stage, and the first of each share of its experts.

    All other ranks hold as much. The process must have no process groups; ``cpu.install`` changes
    torch.

    Args:
        config: a run's configuration, checked against ``spec`` and ``world_size``.

    Raises:
        InputError: the model does not match the naming table (see ``weights.binding.bind``).
    """
    cpu.install()
    sizes = runtime.parallel_sizes(config.megatron)
    stage_ranks = world_size // config.megatron.pipeline_model_parallel_size
    for first in range(0, world_size, stage_ranks):
        with fake_process_groups(first, world_size, sizes) as groups:
            chunks, built = _build(config, spec, groups)
            shared_by = groups.expt_tp.size()
        yield built
        for share in range(1, config.megatron.expert_model_parallel_size):
            # Megatron counts each rank's experts from 0, so the chunks are the same on the other
            # ranks. Ranks that share an expert are consecutive.
            with fake_process_groups(first + share * shared_by, world_size, sizes) as groups:
                held = tuple(_held(chunks, spec, groups))
                yield replace(built, rank=dist.get_rank(), held=held)


def _build(config: Config, spec: ModelSpec, groups: Any) -> tuple[list[torch.nn.Module], BuiltRank]:
    from megatron_espo.megatron.model import build_model
    from megatron_espo.megatron.train_engine import TrainEngine

    dtype = getattr(torch, config.model.dtype)
    # Transformer Engine needs a GPU. Local layers have the same shapes.
    local = config.megatron.model_copy(update={"transformer_impl": "local", "fp8": None})
    with torch.device("meta"), _OnMeta():
        chunks = build_model(spec, local, groups, dtype=dtype)
        held = tuple(_held(chunks, spec, groups))
        overrides = config.megatron.overrides
        engine = TrainEngine(chunks, groups, config.optimizer, 1, overrides)
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    optimized = sum(p.numel() for group in engine.optimizer.param_groups for p in group["params"])
    in_buffers = [b.param_data for b in engine.buffers() if b.param_data is not None]
    return chunks, BuiltRank(
        rank=dist.get_rank(),
        stage=groups.pp.rank(),
        held=held,
        parameters=sum(parameter.numel() for parameter in parameters),
        parameter_bytes=sum(tensor.nbytes for tensor in in_buffers or parameters),
        gradient_bytes=sum(buffer.grad_data.nbytes for buffer in engine.buffers()),
        main_bytes=4 * optimized if dtype.itemsize < 4 else 0,
        adam_bytes=2 * 4 * optimized,
    )


def _held(chunks: list[torch.nn.Module], spec: ModelSpec, groups: Any) -> Iterator[ParamShard]:
    bound = bind(chunks, spec.groups, ShardRanks.of(groups))
    for index, group in enumerate(spec.groups):
        for mapping in (mapping for mapping in group if mapping in bound):
            is_expert = mapping.expert is not None
            sharing = dist.get_process_group_ranks(groups.expt_tp if is_expert else groups.tp)
            shape = tuple(bound[mapping].shape)
            yield ParamShard(index, mapping, shape, tuple(sharing))
