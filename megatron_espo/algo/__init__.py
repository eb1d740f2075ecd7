"""Objectives, advantages and regularizers: torch only, no process groups, Megatron or vLLM."""

from megatron_espo.algo.advantages import (
    entropy_shape,
    group_advantages,
    overlong_penalty,
    zero_variance_signs,
)
from megatron_espo.algo.base import LossInputs, LossOutput, Objective, at_least, importance_ratio
from megatron_espo.algo.objectives import (
    CEGPPO,
    CISPO,
    DAPO,
    DPPO,
    ESPO,
    GMPO,
    GRPO,
    GSPO,
    OBJECTIVES,
    SAPO,
    DrGRPO,
    load_objective,
    would_clip,
)
from megatron_espo.algo.padded import padded_loss
from megatron_espo.algo.regularizers import kl_estimate, rollout_correction, rollout_mask
from megatron_espo.algo.segments import TokenSegments, entropy_groups
