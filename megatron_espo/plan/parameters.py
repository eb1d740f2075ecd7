"""Parameters by pipeline stage: those of the checkpoint, and those that each GPU holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from megatron_espo.mcore.meta import BuiltRank
from megatron_espo.weights.families import Mapping

Groups = Sequence[Sequence[Mapping]]


@dataclass(frozen=True)
class StageParameters:
    """One pipeline stage.

    Attributes:
        layers: decoder layers.
        whole: elements of the checkpoint's tensors whose owner this stage is (a tied embedding belongs to the first).
        per_gpu: elements on each of its GPUs: its shards, whole norms, the padding of the vocabulary.
    """

    stage: int
    layers: int
    whole: int
    per_gpu: int


def elements(mapping: Mapping) -> int:
    """Elements of the Hugging Face tensors of one Megatron parameter."""
    return sum(prod(shape) for _, shape in mapping.huggingface)


def total_parameters(groups: Groups) -> int:
    """Elements of the whole checkpoint, from the naming tables alone."""
    return sum(elements(mapping) for group in groups for mapping in group)


def count_parameters(ranks: Sequence[BuiltRank], groups: Groups) -> list[StageParameters]:
    """Count what was built, stage by stage. RuntimeError where the stages together are not the checkpoint."""
    stages: list[StageParameters] = []
    seen: set[str] = set()
    for stage in sorted({rank.stage for rank in ranks}):
        own = [rank for rank in ranks if rank.stage == stage]
        whole = 0
        for held in (held for rank in own for held in rank.held):
            name = held.mapping.huggingface[0][0]
            if name not in seen:
                seen.add(name)
                whole += elements(held.mapping)
        layers = {held.group for held in own[0].held} - {0, len(groups) - 1}
        stages.append(StageParameters(stage, len(layers), whole, max(rank.parameters for rank in own)))
    built, expected = sum(stage.whole for stage in stages), total_parameters(groups)
    if built != expected:
        raise RuntimeError(f"plan: the built stages hold {built:,} parameters, the checkpoint {expected:,}")
    return stages
