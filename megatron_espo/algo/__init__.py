"""Objectives, advantages and regularizers: torch only, no process groups, Megatron or vLLM."""

from megatron_espo.algo.advantages import (
    entropy_shape,
    group_advantages,
    overlong_penalty,
    zero_variance_signs,
)
from megatron_espo.algo.base import LossInputs, LossOutput, Objective
from megatron_espo.algo.objectives import (
    CEGPPO,
    CISPO,
    DAPO,
    DPPO,
    ESPO,
    GMPO,
    GRPO,
    GSPO,
    SAPO,
    DrGRPO,
    load_objective,
)
from megatron_espo.algo.padded import padded_loss
from megatron_espo.algo.regularizers import kl_estimate, rollout_correction, rollout_mask
from megatron_espo.algo.segments import TokenSegments
