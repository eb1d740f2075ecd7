"""The mathematics of the objectives. Imports torch and nothing else: no process groups, no Megatron, no vLLM."""

from megatron_espo.algo.advantages import group_advantages, overlong_penalty
from megatron_espo.algo.objectives import OBJECTIVES, Objective, policy_loss
from megatron_espo.algo.regularizers import kl_estimate, rollout_correction
from megatron_espo.algo.segments import Annotation, annotate, entropy_groups

__all__ = [
    "OBJECTIVES",
    "Annotation",
    "Objective",
    "annotate",
    "entropy_groups",
    "group_advantages",
    "kl_estimate",
    "overlong_penalty",
    "policy_loss",
    "rollout_correction",
]
