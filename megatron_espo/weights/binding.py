"""Which parameters of this rank's Megatron model belong to which mapping."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megatron_espo.errors import InputError
from megatron_espo.weights.families import Mapping
from megatron_espo.weights.layouts import Layout, local_shape

LAYER_NAME = re.compile(r"^decoder\.layers\.(\d+)\.")


class Cut(NamedTuple):
    """A rank's place in a group that shares something."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class Place:
    """A rank's place among those that share a layer: tensor parallelism, that of the experts, and expert parallelism."""

    tp: Cut = Cut()
    expert_tp: Cut = Cut()
    ep: Cut = Cut()

    @classmethod
    def of(cls, pg_collection: Any) -> "Place":
        """From Megatron's ``ProcessGroupCollection``: ``tp``, ``expt_tp`` and ``ep``. Zero collectives."""
        groups = (pg_collection.tp, pg_collection.expt_tp, pg_collection.ep)
        return cls(*(Cut(group.rank(), group.size()) for group in groups))

    def cut(self, mapping: Mapping) -> Cut:
        """Which shard of the parameter this rank has, of how many."""
        return self.tp if mapping.expert is None else self.expert_tp

    def owner(self, mapping: Mapping) -> int:
        """The expert-parallel rank that holds the parameter's expert; 0 where there is none."""
        return 0 if mapping.expert is None else mapping.expert * self.ep.size // mapping.num_experts

    def holds(self, mapping: Mapping) -> bool:
        """Whether this rank has a shard of the parameter, once its pipeline stage has the layer."""
        return mapping.expert is None or self.owner(mapping) == self.ep.rank

    def local_names(self, mapping: Mapping) -> tuple[str, ...]:
        """Megatron's names for it on its owner, which counts its own experts."""
        if mapping.expert is None:
            return mapping.megatron
        number = mapping.expert % (mapping.num_experts // self.ep.size)
        return tuple(name.format(expert=number) for name in mapping.megatron)


class Bound(NamedTuple):
    """A parameter of this rank and what it is made of."""

    mapping: Mapping
    parameter: torch.nn.Parameter


def bind(chunks: Sequence[torch.nn.Module], groups: Sequence[Sequence[Mapping]], place: Place) -> list[list[Bound]]:
    """Find the mapping of every parameter of this rank's model chunks. Zero collectives.

    Args:
        chunks: the rank's ``GPTModel`` chunks (more than one with a virtual pipeline), wrapped or not.
        groups: ``families.model_groups``.
        place: this rank's.

    Returns:
        one list for each group, in the group's order; empty where this pipeline stage has nothing of it.

    Raises:
        InputError: a parameter without a mapping, a mapping of an owned group without a parameter, or a shape that the
            Hugging Face configuration does not imply.
    """
    held = [[mapping for mapping in group if place.holds(mapping)] for group in groups]
    known = {name: mapping for group in held for mapping in group for name in place.local_names(mapping)}
    bound: dict[int, Bound] = {}
    required: set[int] = set()
    for chunk in map(unwrap, chunks):
        for local_name, parameter in chunk.named_parameters():
            name = _global_name(local_name, chunk)
            if name not in known:
                raise InputError(
                    f"Megatron parameter {name!r} has no Hugging Face counterpart in this model family; the model was "
                    "built with an option that the family does not have (a bias, a norm, experts?)"
                )
            mapping = known[name]
            if id(mapping) in bound:
                raise InputError(f"Megatron has two parameters for {mapping.huggingface[0][0]!r}; one is {name!r}")
            _check_shape(name, parameter, mapping, place.cut(mapping).size)
            bound[id(mapping)] = Bound(mapping, parameter)
        required.update(_owned_groups(chunk, len(groups)))
    for index in sorted(required):
        for mapping in held[index]:
            if id(mapping) not in bound:
                names = " / ".join(place.local_names(mapping))
                raise InputError(f"the Megatron model lacks {names}, home of {mapping.huggingface[0][0]!r}")
    return [[bound[id(mapping)] for mapping in group if id(mapping) in bound] for group in held]


def unwrap(chunk: torch.nn.Module) -> torch.nn.Module:
    """The ``GPTModel`` inside Megatron's wrappers (data parallel, mixed precision)."""
    while not hasattr(chunk, "decoder"):
        chunk = chunk.module
    return chunk


def _global_name(name: str, chunk: torch.nn.Module) -> str:
    """The parameter's name with the layer counted from the model's first one instead of the chunk's."""
    match = LAYER_NAME.match(name)
    if match is None:
        return name
    layer = chunk.decoder.layers[int(match[1])].layer_number - 1
    return f"decoder.layers.{layer}.{name[match.end() :]}"


def _owned_groups(chunk: torch.nn.Module, num_groups: int) -> list[int]:
    """Indices of the groups that a chunk has to hold in full."""
    owned = [layer.layer_number for layer in chunk.decoder.layers]
    if chunk.pre_process:
        owned.append(0)
    if chunk.post_process:
        owned.append(num_groups - 1)
    return owned


def _check_shape(name: str, parameter: torch.nn.Parameter, mapping: Mapping, tp_size: int) -> None:
    shapes = [shape for _, shape in mapping.huggingface]
    padded_vocab = None
    if mapping.layout is Layout.VOCAB:
        padded_vocab = max(parameter.shape[0] * tp_size, shapes[0][0])
    try:
        expected = local_shape(mapping.layout, shapes, tp_size, padded_vocab)
    except InputError as error:
        raise InputError(f"Megatron parameter {name!r}: {error}") from None
    if tuple(parameter.shape) != expected:
        raise InputError(
            f"Megatron parameter {name!r}: config.json implies shape {expected} on each of {tp_size} tensor-parallel "
            f"ranks, the model has {tuple(parameter.shape)}; build the model from the same config.json"
        )
