"""``megatron.overrides``: fields of Megatron-Core's own configurations, passed through."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from megatron_espo.errors import InputError

# Fields that a contract of this package fixes, and the contract.
FIXED = {
    "calculate_per_token_loss": "the loss is a local sum, which the schedule must not scale",
    "hidden_dropout": "log-probs of engine and trainer must agree",
    "attention_dropout": "log-probs of engine and trainer must agree",
    "moe_router_load_balancing_type": "a balancing loss would move weights without an advantage",
    "moe_aux_loss_coeff": "a balancing loss would move weights without an advantage",
    "moe_z_loss_coeff": "a router loss would move weights without an advantage",
    "moe_input_jitter_eps": "log-probs of engine and trainer must agree",
    "moe_expert_capacity_factor": "dropped tokens would have no gradient",
    "moe_expert_rank_capacity_factor": "dropped tokens would have no gradient",
    "moe_router_force_load_balancing": "routing would be random",
    "moe_router_force_biased": "routing would be random",
    "use_mup": "log-probs of engine and trainer must agree",
    "mtp_num_layers": "prediction heads for further tokens are not trained",
    "overlap_param_gather_with_optimizer_step": "the weight update reads all weights right after "
    "the optimizer step",
    "use_megatron_fsdp": "weights are read from Megatron's DistributedDataParallel",
    "use_custom_fsdp": "weights are read from Megatron's DistributedDataParallel",
    "average_in_collective": "the loss is already divided by the token count of the whole batch",
    "fp8_param_gather": "the weight update reads weights in model.dtype",
    "fp4_param_gather": "the weight update reads weights in model.dtype",
    "fp4_param": "the weight update reads weights in model.dtype",
    "fp8_param": "the weight update reads weights in model.dtype",
    "init_model_with_meta_device": "weights are loaded from a model folder",
    "use_cpu_initialization": "weights are loaded from a model folder",
    "perform_initialization": "weights are loaded from a model folder",
    "variable_seq_lengths": "micro-batches of a pipeline have one shape",
    "optimizer": "checkpoints hold Adam's states",
    "grad_norm_skip_threshold": "optimizer.spike_factor skips such steps and reports them",
}
# Fields whose value follows from these keys of the run's configuration.
FROM_SETTINGS = {
    "lr": "optimizer.lr", "min_lr": "optimizer.min_lr", "weight_decay": "optimizer.weight_decay",
    "clip_grad": "optimizer.clip_grad", "adam_beta1": "optimizer.adam_beta1",
    "adam_beta2": "optimizer.adam_beta2", "adam_eps": "optimizer.adam_eps",
    "use_distributed_optimizer": "optimizer.use_distributed_optimizer", "bf16": "model.dtype",
    "fp16": "model.dtype", "params_dtype": "model.dtype", "pipeline_dtype": "model.dtype",
}  # fmt: skip


@dataclass(frozen=True)
class Overrides:
    """Checked overrides, by the configuration that has the field; some fields are in several."""

    transformer: Mapping[str, Any]
    ddp: Mapping[str, Any]
    optimizer: Mapping[str, Any]


def check_overrides(overrides: Mapping[str, Any], fixed: Mapping[str, Any]) -> Overrides:
    """Check names and types of ``megatron.overrides`` against the installed Megatron-Core.

    Args:
        overrides: ``{field: value}``.
        fixed: further fields that may not be set, with the reason.

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
    return Overrides(*found)


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
