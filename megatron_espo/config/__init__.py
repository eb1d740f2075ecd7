"""Settings of a run: schema, loader, checks and reference. Imports neither torch nor
Megatron-Core nor vLLM."""

from megatron_espo.config.loading import load_config
from megatron_espo.config.reference import render_reference
from megatron_espo.config.schema import (
    Algorithm,
    Config,
    Data,
    Judge,
    Megatron,
    Model,
    Optimizer,
    Reward,
    Rollout,
    Run,
)
