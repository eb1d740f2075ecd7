"""What is compared: layouts, ways to cut micro-batches, objectives. Standard library only."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import lcm
from typing import Any

TP, PP, VPP, CP, EP = (
    f"{kind}_parallel_size"
    for kind in ("tensor_model", "pipeline_model", "virtual_pipeline_model", "context", "expert_model")
)
OBJECTIVES = ("espo", "gspo", "grpo", "gmpo")


@dataclass(frozen=True)
class Layout:
    """A parallel layout under Megatron's names.

    Attributes:
        ranks: the fewest ranks that show it.
        sizes: settings of the ``megatron`` section.
        moe: whether it needs a mixture-of-experts model.
    """

    name: str
    ranks: int
    sizes: dict[str, Any] = field(default_factory=dict)
    moe: bool = False

    def fits(self, world_size: int) -> bool:
        """Whether ``world_size`` ranks can be laid out so; data parallelism takes what remains."""
        model = self.sizes.get(TP, 1) * self.sizes.get(PP, 1) * self.sizes.get(CP, 1)
        experts = self.sizes.get(EP, 1) * self.sizes.get(PP, 1)
        return world_size >= self.ranks and world_size % lcm(model, experts) == 0


LAYOUTS = (
    Layout("tp2", 2, {TP: 2}),
    Layout("tp2 sp", 2, {TP: 2, "sequence_parallel": True}),
    Layout("pp2", 2, {PP: 2}),
    Layout("pp2 vpp2", 2, {PP: 2, VPP: 2}),
    Layout("cp2", 2, {CP: 2}),
    Layout("dp2", 2),
    Layout("ep2", 2, {EP: 2}, moe=True),
    Layout("tp2 pp2", 4, {TP: 2, PP: 2}),
    Layout("tp2 cp2", 4, {TP: 2, CP: 2}),
    Layout("tp2 sp ep2", 4, {TP: 2, "sequence_parallel": True, EP: 2}, moe=True),
    Layout("pp2 ep2", 4, {PP: 2, EP: 2}, moe=True),
)

MICRO_BATCHES: dict[str, dict[str, Any]] = {
    "1": {"micro_batch_size": 1, "packed": False},
    "2": {"micro_batch_size": 2, "packed": False},
    "4": {"micro_batch_size": 4, "packed": False},
    "packed": {"max_tokens_per_micro_batch": 96},
}
"""Responses in a padded micro-batch, or responses packed up to a budget of tokens: settings of the ``megatron`` section."""

SHORT = {
    "layouts": ("tp2 sp", "pp2 vpp2", "cp2", "dp2", "ep2"),
    "micro_batches": ("2", "packed"),
    "objectives": ("espo", "gmpo"),
}
"""What ``--short`` keeps: each kind of parallelism once, both kinds of micro-batch, both kinds of segment."""


@dataclass(frozen=True)
class Selection:
    """The part of the matrix that one call runs."""

    layouts: tuple[str, ...]
    micro_batches: tuple[str, ...]
    objectives: tuple[str, ...]

    def of_world(self, world_size: int, *, has_experts: bool) -> Iterator[Layout]:
        """The selected layouts that ``world_size`` ranks and the model allow."""
        for layout in LAYOUTS:
            if layout.name in self.layouts and layout.fits(world_size) and layout.moe == has_experts:
                yield layout
