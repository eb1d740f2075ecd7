"""The compared layouts, kinds of micro-batches and objectives. Standard library only."""

from dataclasses import dataclass, field
from typing import Any

TP, PP, CP = (f"{kind}_parallel_size" for kind in ("tensor_model", "pipeline_model", "context"))
VPP, EP = f"virtual_{PP}", "expert_model_parallel_size"


@dataclass(frozen=True)
class ParallelLayout:
    """A parallel layout.

    Attributes:
        ranks: the number of ranks is a multiple of it; data parallelism takes the rest.
        sizes: settings of the ``megatron`` section.
    """

    name: str
    ranks: int
    sizes: dict[str, Any] = field(default_factory=dict)

    @property
    def has_experts(self) -> bool:
        """Whether it needs a mixture-of-experts model."""
        return EP in self.sizes


_ALL = (
    ParallelLayout("tp2", 2, {TP: 2}),
    ParallelLayout("tp2 sp", 2, {TP: 2, "sequence_parallel": True}),
    ParallelLayout("pp2", 2, {PP: 2}),
    ParallelLayout("pp2 vpp2", 2, {PP: 2, VPP: 2}),
    ParallelLayout("cp2", 2, {CP: 2}),
    ParallelLayout("dp2", 2),
    ParallelLayout("ep2", 2, {EP: 2}),
    ParallelLayout("tp2 pp2", 4, {TP: 2, PP: 2}),
    ParallelLayout("tp2 cp2", 4, {TP: 2, CP: 2}),
    ParallelLayout("tp2 sp ep2", 4, {TP: 2, "sequence_parallel": True, EP: 2}),
    ParallelLayout("pp2 ep2", 4, {PP: 2, EP: 2}),
)
LAYOUTS = {layout.name: layout for layout in _ALL}
OBJECTIVES = ("espo", "gspo", "grpo", "gmpo")
# Settings of the ``megatron`` section: responses in a padded micro-batch, or packed responses.
MICRO_BATCHES: dict[str, dict[str, Any]] = {
    "1": {"micro_batch_size": 1, "packed": False},
    "2": {"micro_batch_size": 2, "packed": False},
    "4": {"micro_batch_size": 4, "packed": False},
    "packed": {"max_tokens_per_micro_batch": 96},
}

# ``--short`` has each kind of parallelism, of micro-batch and of segment once.
SHORT_LAYOUTS = ("tp2 sp", "pp2 vpp2", "cp2", "dp2", "ep2")
SHORT_MICRO_BATCHES = ("2", "packed")
SHORT_OBJECTIVES = ("espo", "gmpo")
