"""What vLLM holds on each of its GPUs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from megatron_espo.weights.families import Mapping, model_sizes, query_groups
from megatron_espo.weights.layouts import Layout


@dataclass(frozen=True)
class Engine:
    """One engine, per GPU; all are alike.

    Attributes:
        number: of engines.
        gpus: GPUs it spans (``rollout.tensor_parallel_size``).
        shares_gpus: whether they are also the trainer's; those of its owner and the next ranks then.
        on_hosts: whether they are on machines of their own (``rollout.hosts``).
        budget_bytes: what vLLM takes, ``rollout.gpu_memory_utilization`` of the GPU.
        weight_bytes: the model.
        kv_bytes_per_token: keys and values of one token.
        kv_tokens: tokens that fit beside the weights, before vLLM's own workspace.
        max_model_len: longest prompt and response.
    """

    number: int
    gpus: int
    shares_gpus: bool
    on_hosts: bool
    budget_bytes: int
    weight_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int
    max_model_len: int


def plan_engine(
    config: Any, hf_config: dict[str, Any], groups: Sequence[Sequence[Mapping]], itemsize: int, shares_gpus: bool, gpu_memory: int
) -> Engine:
    """Weights cut as vLLM cuts them (norms whole), the rest of its budget for keys and values."""
    gpus = config.rollout.tensor_parallel_size
    weights = 0
    for mapping in (mapping for group in groups for mapping in group):
        size = sum(prod(shape) for _, shape in mapping.huggingface) * itemsize
        weights += size if mapping.layout is Layout.REPLICATED else -(-size // gpus)
    heads = max(1, query_groups(hf_config) // gpus)  # vLLM copies a head to more GPUs than there are heads
    per_token = 2 * hf_config["num_hidden_layers"] * heads * model_sizes(hf_config)["head_dim"] * itemsize
    budget = int(config.rollout.gpu_memory_utilization * gpu_memory)
    longest = config.rollout.max_model_len or hf_config["max_position_embeddings"]
    return Engine(
        number=config.rollout.engines,
        gpus=gpus,
        shares_gpus=shares_gpus,
        on_hosts=bool(config.rollout.hosts),
        budget_bytes=budget,
        weight_bytes=weights,
        kv_bytes_per_token=per_token,
        kv_tokens=max(0, budget - weights) // per_token,
        max_model_len=longest,
    )


def engine_problems(engine: Engine) -> Iterator[str]:
    """Why vLLM would not start."""
    if engine.weight_bytes > engine.budget_bytes:
        yield (
            f"the engine's weights take {engine.weight_bytes / 1e9:.1f} GB on each of its {engine.gpus} GPUs, its share "
            f"(rollout.gpu_memory_utilization) is {engine.budget_bytes / 1e9:.1f} GB"
        )
    elif engine.kv_tokens < engine.max_model_len:
        yield (
            f"the engine's cache holds {engine.kv_tokens:,} tokens, one sequence may have {engine.max_model_len:,} "
            "(rollout.max_model_len, null: the model's context)"
        )
