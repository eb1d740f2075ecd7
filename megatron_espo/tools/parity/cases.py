"""The compared layouts, kinds of micro-batches and objectives. Standard library only."""

from math import lcm
from typing import Any

TP, PP, CP = (f"{kind}_parallel_size" for kind in ("tensor_model", "pipeline_model", "context"))
VPP, EP = f"virtual_{PP}", "expert_model_parallel_size"

# Settings of the ``megatron`` section.
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {TP: 2},
    "tp2 sp": {TP: 2, "sequence_parallel": True},
    "pp2": {PP: 2},
    "pp2 vpp2": {PP: 2, VPP: 2},
    "cp2": {CP: 2},
    "dp2": {},
    "ep2": {EP: 2},
    "tp2 pp2": {TP: 2, PP: 2},
    "tp2 cp2": {TP: 2, CP: 2},
    "tp2 sp ep2": {TP: 2, "sequence_parallel": True, EP: 2},
    "pp2 ep2": {PP: 2, EP: 2},
}
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


def ranks(layout: str) -> int:
    """Number of ranks of which the layout needs a multiple; data parallelism takes the rest."""
    tp, pp, cp, ep = (LAYOUTS[layout].get(key, 1) for key in (TP, PP, CP, EP))
    return max(2, pp * lcm(tp * cp, tp * ep))
