"""Find the Hugging Face mapping of each parameter of this rank's Megatron model."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megatron_espo.errors import InputError
from megatron_espo.models.layouts import local_shape
from megatron_espo.models.mapping import ParamMapping

_LAYER_NAME = re.compile(r"^decoder\.layers\.(\d+)\.")


class ShardIndex(NamedTuple):
    """A rank's index in a group of ``size`` ranks that share a parameter."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class ShardRanks:
    """A rank's indices among the ranks that share a layer.

    Attributes:
        tp: tensor parallelism of the dense parameters.
        expert_tp: tensor parallelism of the experts.
        ep: expert parallelism.
    """

    tp: ShardIndex = ShardIndex()
    expert_tp: ShardIndex = ShardIndex()
    ep: ShardIndex = ShardIndex()

    @classmethod
    def of(cls, groups: Any) -> "ShardRanks":
        """Read ``tp``, ``expt_tp`` and ``ep`` of Megatron's ``ProcessGroupCollection``."""
        shared = (groups.tp, groups.expt_tp, groups.ep)
        return cls(*(ShardIndex(group.rank(), group.size()) for group in shared))

    def shard(self, mapping: ParamMapping) -> ShardIndex:
        """Return the index of this rank's shard of the parameter."""
        return self.tp if mapping.expert is None else self.expert_tp

    def owner(self, mapping: ParamMapping) -> int:
        """Return the expert-parallel rank that holds the parameter's expert; 0 without one."""
        return 0 if mapping.expert is None else mapping.expert * self.ep.size // mapping.num_experts

    def holds(self, mapping: ParamMapping) -> bool:
        """Whether this rank has a shard of the parameter, if its stage has the layer."""
        return mapping.expert is None or self.owner(mapping) == self.ep.rank

    def local_names(self, mapping: ParamMapping) -> tuple[str, ...]:
        """Return Megatron's names on the owner, which counts its own experts from 0."""
        if mapping.expert is None:
            return mapping.megatron
        number = mapping.expert % (mapping.num_experts // self.ep.size)
        return tuple(name.format(expert=number) for name in mapping.megatron)


def bind(
    chunks: Sequence[torch.nn.Module], groups: Sequence[Sequence[ParamMapping]], ranks: ShardRanks
) -> dict[ParamMapping, torch.nn.Parameter]:
    """Find the mapping of every parameter of this rank's model chunks. Zero collectives.

    Args:
        chunks: the rank's ``GPTModel`` chunks (several with a virtual pipeline), wrapped or not.
        groups: ``ModelSpec.groups``.
        ranks: this rank's indices.

    Raises:
        InputError: a parameter without a mapping, a mapping of an owned group without a parameter,
            or a shape that differs from the Hugging Face configuration.
    """
    held = [[mapping for mapping in group if ranks.holds(mapping)] for group in groups]
    known = {name: m for group in held for m in group for name in ranks.local_names(m)}
    bound: dict[ParamMapping, torch.nn.Parameter] = {}
    required: set[int] = set()
    for chunk in map(unwrap, chunks):
        for local_name, parameter in chunk.named_parameters():
            name = _global_name(local_name, chunk)
            if name not in known:
                raise InputError(
                    f"Megatron parameter {name!r} has no Hugging Face counterpart in this model "
                    "family; the model was built with an option that the family does not have "
                    "(a bias, a norm, experts?)"
                )
            mapping = known[name]
            if mapping in bound:
                source = mapping.huggingface[0][0]
                raise InputError(f"Megatron has two parameters for {source!r}; one is {name!r}")
            _check_shape(name, parameter, mapping, ranks.shard(mapping).size)
            bound[mapping] = parameter
        required.update(layer.layer_number for layer in chunk.decoder.layers)
        required.update([0] if chunk.pre_process else [])
        required.update([len(groups) - 1] if chunk.post_process else [])
    for mapping in (mapping for index in sorted(required) for mapping in held[index]):
        if mapping not in bound:
            names, source = " / ".join(ranks.local_names(mapping)), mapping.huggingface[0][0]
            raise InputError(f"the Megatron model lacks {names}, which holds {source!r}")
    return bound


def unwrap(chunk: Any) -> Any:
    """Return the ``GPTModel`` inside Megatron's wrappers (data parallel, mixed precision)."""
    while not hasattr(chunk, "decoder"):
        chunk = chunk.module
    return chunk


def _global_name(name: str, chunk: Any) -> str:
    """Replace the layer's index in the chunk by its index in the model."""
    match = _LAYER_NAME.match(name)
    if match is None:
        return name
    layer = chunk.decoder.layers[int(match[1])].layer_number - 1
    return f"decoder.layers.{layer}.{name[match.end() :]}"


def _check_shape(
    name: str, parameter: torch.nn.Parameter, mapping: ParamMapping, tp_size: int
) -> None:
    shapes = [shape for _, shape in mapping.huggingface]
    try:
        expected = local_shape(mapping.layout, shapes, tp_size, parameter.shape[0] * tp_size)
    except InputError as error:
        raise InputError(f"Megatron parameter {name!r}: {error}") from None
    if tuple(parameter.shape) != expected:
        raise InputError(
            f"Megatron parameter {name!r}: config.json implies shape {expected} on each of "
            f"{tp_size} tensor-parallel ranks, the model has {tuple(parameter.shape)}; build the "
            "model from the same config.json"
        )
