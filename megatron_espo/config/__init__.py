"""One training run's settings: read, checked and explained before torch, Megatron-Core or vLLM is imported."""

from megatron_espo.config.loading import load_config
from megatron_espo.config.reference import render_reference
from megatron_espo.config.schema import (
    Algorithm,
    Config,
    Data,
    Eval,
    Megatron,
    Model,
    Optimizer,
    Reward,
    Rollout,
    Run,
)

__all__ = [
    "Algorithm",
    "Config",
    "Data",
    "Eval",
    "Megatron",
    "Model",
    "Optimizer",
    "Reward",
    "Rollout",
    "Run",
    "load_config",
    "render_reference",
]
