"""The compared layouts, kinds of micro-batches and objectives. Standard library only."""

from dataclasses import dataclass, field
from math import lcm
from typing import Any, Literal, get_args

TP, PP, CP = (f"{kind}_parallel_size" for kind in ("tensor_model", "pipeline_model", "context"))
VPP, EP = f"virtual_{PP}", "expert_model_parallel_size"
Objective = Literal["espo", "gspo", "grpo", "gmpo"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


@dataclass(frozen=True)
class ParallelLayout:
    """A parallel layout.

    Attributes:
        ranks: the fewest ranks of the layout.
        sizes: settings of the ``megatron`` section.
        moe: whether it needs a mixture-of-experts model.
    """

    name: str
    ranks: int
    sizes: dict[str, Any] = field(default_factory=dict)
    moe: bool = False

    def fits(self, world_size: int) -> bool:
        """Whether ``world_size`` ranks allow the layout; data parallelism takes the rest."""
        model = self.sizes.get(TP, 1) * self.sizes.get(PP, 1) * self.sizes.get(CP, 1)
        experts = self.sizes.get(EP, 1) * self.sizes.get(PP, 1)
        return world_size >= self.ranks and world_size % lcm(model, experts) == 0


_ALL = (
    ParallelLayout("tp2", 2, {TP: 2}),
    ParallelLayout("tp2 sp", 2, {TP: 2, "sequence_parallel": True}),
    ParallelLayout("pp2", 2, {PP: 2}),
    ParallelLayout("pp2 vpp2", 2, {PP: 2, VPP: 2}),
    ParallelLayout("cp2", 2, {CP: 2}),
    ParallelLayout("dp2", 2),
    ParallelLayout("ep2", 2, {EP: 2}, moe=True),
    ParallelLayout("tp2 pp2", 4, {TP: 2, PP: 2}),
    ParallelLayout("tp2 cp2", 4, {TP: 2, CP: 2}),
    ParallelLayout("tp2 sp ep2", 4, {TP: 2, "sequence_parallel": True, EP: 2}, moe=True),
    ParallelLayout("pp2 ep2", 4, {PP: 2, EP: 2}, moe=True),
)
LAYOUTS = {layout.name: layout for layout in _ALL}

# Settings of the ``megatron`` section: responses in a padded micro-batch, or packed responses.
MICRO_BATCHES: dict[str, dict[str, Any]] = {
    str(size): {"micro_batch_size": size, "packed": False} for size in (1, 2, 4)
}
MICRO_BATCHES["packed"] = {"max_tokens_per_micro_batch": 96}

# ``--short`` has each kind of parallelism, of micro-batch and of segment once.
SHORT_LAYOUTS = ("tp2 sp", "pp2 vpp2", "cp2", "dp2", "ep2")
SHORT_MICRO_BATCHES = ("2", "packed")
SHORT_OBJECTIVES: tuple[Objective, ...] = ("espo", "gmpo")
