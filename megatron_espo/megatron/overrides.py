"""``megatron.overrides``: fields of Megatron-Core's own configurations, passed through."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from megatron_espo.errors import InputError

OPTIMIZER_SETTINGS = (
    "lr min_lr weight_decay clip_grad use_distributed_optimizer adam_beta1 adam_beta2 adam_eps"
).split()
# Fields whose value follows from these keys of the run's configuration.
FROM_SETTINGS = {name: f"optimizer.{name}" for name in OPTIMIZER_SETTINGS}
FROM_SETTINGS |= dict.fromkeys(("bf16", "fp16", "params_dtype", "pipeline_dtype"), "model.dtype")
# Contracts of this package, and the fields that they fix.
CONTRACTS = {
    "the loss is a local sum, which the schedule must not scale": "calculate_per_token_loss",
    "log-probs of engine and trainer must agree": (
        "hidden_dropout attention_dropout moe_input_jitter_eps use_mup"
    ),
    "a balancing loss would move weights without an advantage": (
        "moe_router_load_balancing_type moe_aux_loss_coeff"
    ),
    "a router loss would move weights without an advantage": "moe_z_loss_coeff",
    "dropped tokens would have no gradient": (
        "moe_expert_capacity_factor moe_expert_rank_capacity_factor"
    ),
    "routing would be random": "moe_router_force_load_balancing moe_router_force_biased",
    "prediction heads for further tokens are not trained": "mtp_num_layers",
    "the weight update reads all weights right after the optimizer step": (
        "overlap_param_gather_with_optimizer_step"
    ),
    "weights are read from Megatron's DistributedDataParallel": "use_megatron_fsdp use_custom_fsdp",
    "the loss is already divided by the token count of the whole batch": "average_in_collective",
    "the weight update reads weights in model.dtype": (
        "fp8_param_gather fp4_param_gather fp4_param fp8_param"
    ),
    "weights are loaded from a model folder": (
        "init_model_with_meta_device use_cpu_initialization perform_initialization"
    ),
    "micro-batches of a pipeline have one shape": "variable_seq_lengths",
    "checkpoints hold Adam's states": "optimizer",
    "optimizer.spike_factor skips such steps and reports them": "grad_norm_skip_threshold",
}
FIXED = {name: contract for contract, names in CONTRACTS.items() for name in names.split()}


def check_overrides(overrides: Mapping[str, Any], fixed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Check names and types of ``megatron.overrides`` against the installed Megatron-Core.

    Args:
        overrides: ``{field: value}``.
        fixed: further fields that may not be set, with the reason.

    Returns:
        The overrides of ``TransformerConfig``, of ``DistributedDataParallelConfig`` and of
            ``OptimizerConfig``. Some fields are in several.

    Raises:
        InputError: an unknown field (the closest names are given), a value of another type, or a
            field that this package or another setting owns.
    """
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    owners = (TransformerConfig, DistributedDataParallelConfig, OptimizerConfig)
    names = [{field.name for field in fields(owner)} for owner in owners]
    found: list[dict[str, Any]] = [{}, {}, {}]
    for name, value in overrides.items():
        key = f"megatron.overrides.{name}"
        if not any(name in known for known in names):
            close = difflib.get_close_matches(name, sorted(set.union(*names)), n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise InputError(
                f"{key}: expected a field of Megatron-Core's TransformerConfig, "
                f"DistributedDataParallelConfig or OptimizerConfig, got {name}{hint}"
            )
        if setting := FROM_SETTINGS.get(name):
            raise InputError(f"{key}: expected this value in {setting}, got {value!r} here")
        if reason := FIXED.get(name) or fixed.get(name):
            raise InputError(f"{key}: expected no override ({reason}), got {value!r}")
        for owner, known, chosen in zip(owners, names, found, strict=True):
            if name in known:
                chosen[name] = _checked(key, get_type_hints(owner)[name], value)
    return found


def _checked(key: str, hint: Any, value: Any) -> Any:
    """``value``, if it has the type ``hint``. A dtype is given by its name: ``bfloat16``."""
    if hint is torch.dtype and isinstance(getattr(torch, str(value), None), torch.dtype):
        return getattr(torch, value)
    try:
        return TypeAdapter(hint, config=ConfigDict(strict=True)).validate_python(value)
    except PydanticSchemaGenerationError:
        expected = (
            "the name of a torch dtype"
            if hint is torch.dtype
            else "no override (this field takes an object of Python)"
        )
    except ValidationError as error:
        expected = "; ".join(problem["msg"] for problem in error.errors())
    raise InputError(f"{key}: expected {expected}, got {value!r}")
