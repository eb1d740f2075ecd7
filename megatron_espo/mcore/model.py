"""From a Hugging Face ``config.json`` to Megatron-Core's own ``GPTModel``, one chunk per pipeline (and virtual pipeline) stage."""

import importlib.util
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megatron_espo.config.experts import read_experts
from megatron_espo.config.placement import ARCHITECTURES
from megatron_espo.errors import InputError


@dataclass(frozen=True)
class Layout:
    """Parallel sizes, recomputation and 8-bit arithmetic under Megatron's own names; the same fields as the configuration's ``megatron`` section."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    sequence_parallel: bool = False
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    fp8: str | None = None
    fp8_recipe: str = "tensorwise"

    @classmethod
    def of(cls, megatron: Any) -> "Layout":
        """From the ``megatron`` section of the configuration."""
        return cls(**{field.name: getattr(megatron, field.name) for field in fields(cls)})


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """Read ``config.json`` of a local Hugging Face folder; never asks a hub."""
    file = Path(path, "config.json")
    if not file.is_file():
        raise InputError(f"{path}: expected a Hugging Face model folder with a config.json, which is not there")
    return json.loads(file.read_text())


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int) -> int:
    """Rows of Megatron's embedding: the true vocabulary rounded up so that every tensor-parallel shard has as many."""
    shard = -(-vocab_size // tensor_model_parallel_size)
    return shard * tensor_model_parallel_size


def use_transformer_engine(transformer_impl: str) -> bool:
    """Resolve ``auto``: Transformer Engine where there is CUDA and the package, Megatron's local layers elsewhere."""
    if transformer_impl == "auto":
        return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    return transformer_impl == "transformer_engine"


def transformer_config(hf_config: dict[str, Any], layout: Layout, dtype: torch.dtype, transformer_impl: str = "auto"):
    """Megatron's ``TransformerConfig`` for a Hugging Face configuration.

    Raises:
        InputError: an architecture, activation or attention variant that is not supported, by name.
    """
    from megatron.core.transformer import TransformerConfig

    architecture = (hf_config.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise InputError(f"config.json: architectures: expected one of {', '.join(ARCHITECTURES)}, got {architecture}")
    if hf_config.get("hidden_act", "silu") != "silu":
        raise InputError(f"config.json: hidden_act: expected silu, got {hf_config['hidden_act']}")
    qkv_bias, qk_layernorm = ARCHITECTURES[architecture]
    heads = hf_config["num_attention_heads"]
    te = use_transformer_engine(transformer_impl)
    if not te:  # a plan of such a run, which has its shapes
        layout = replace(layout, fp8=None)
    return TransformerConfig(
        num_layers=hf_config["num_hidden_layers"],
        hidden_size=hf_config["hidden_size"],
        ffn_hidden_size=hf_config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=hf_config.get("num_key_value_heads") or heads,
        kv_channels=hf_config.get("head_dim") or hf_config["hidden_size"] // heads,
        normalization="RMSNorm",
        layernorm_epsilon=hf_config.get("rms_norm_eps", 1e-6),
        qk_layernorm=qk_layernorm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=qkv_bias or bool(hf_config.get("attention_bias")),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Float weights sit in the loss's numerator; only this form is left unscaled by the schedule.
        calculate_per_token_loss=True,
        # Of two stages each is the other's next and previous; only this order of messages keeps an interleaved schedule's apart.
        overlap_p2p_comm=layout.virtual_pipeline_model_parallel_size is not None,
        batch_p2p_comm=layout.virtual_pipeline_model_parallel_size is None,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        bias_activation_fusion=te,
        bias_dropout_fusion=te,
        gradient_accumulation_fusion=te,
        masked_softmax_fusion=te,
        persist_layer_norm=te,
        moe_grouped_gemm=te,
        **moe_arguments(hf_config, layout.fp8),
        **layout.__dict__,
    )


def moe_arguments(hf_config: dict[str, Any], fp8: str | None = None) -> dict[str, Any]:
    """What ``TransformerConfig`` has to know of a model's experts; empty for a dense model."""
    experts = read_experts(hf_config)
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn,
        # Megatron's checkpoint of a uniform stack, which this 1 says it is, loads in any pipeline layout.
        "moe_layer_freq": 1 if all(experts.layers) else [int(sparse) for sparse in experts.layers],
        "moe_router_topk": experts.per_token,
        # Weights that sum to one over the chosen experts are the softmax over the chosen logits.
        "moe_router_pre_softmax": not experts.normalized,
        "moe_router_dtype": "fp32",
        # The policy's gradient alone: a balancing loss would move the weights where every advantage is zero.
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        # Matrix products in 8 bits want multiples of 16 tokens an expert.
        "moe_router_padding_for_quantization": bool(fp8),
    }


def build_model(
    hf_config: dict[str, Any], layout: Layout, groups, *, dtype: torch.dtype = torch.float32, transformer_impl: str = "auto"
) -> list[torch.nn.Module]:
    """Build this rank's chunks of Megatron's ``GPTModel``, with uninitialised weights.

    Args:
        hf_config: the parsed ``config.json``.
        groups: Megatron's ``ProcessGroupCollection``.
        dtype: parameter dtype.

    Returns:
        One chunk, or one for each virtual pipeline stage, on the current device.
    """
    from megatron.core.models.gpt import GPTModel

    config = transformer_config(hf_config, layout, dtype, transformer_impl)
    virtual = layout.virtual_pipeline_model_parallel_size
    stages = range(virtual or 1)
    chunks = []
    for stage in stages:
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=_layer_spec(config, transformer_impl, stage if virtual else None, groups),
            vocab_size=padded_vocab_size(hf_config["vocab_size"], layout.tensor_model_parallel_size),
            max_sequence_length=hf_config["max_position_embeddings"],
            pre_process=groups.pp.rank() == 0 and stage == 0,
            post_process=groups.pp.rank() == groups.pp.size() - 1 and stage == stages[-1],
            share_embeddings_and_output_weights=bool(hf_config.get("tie_word_embeddings")),
            position_embedding_type="rope",
            pg_collection=groups,
            vp_stage=stage if virtual else None,
            **rope_arguments(hf_config),
        )
        if not use_transformer_engine(transformer_impl):
            from megatron_espo.mcore.attention import BranchedRotary

            chunk.rotary_pos_emb = BranchedRotary(chunk.rotary_pos_emb)
        _mark_shards(chunk)
        chunks.append(chunk.cuda())
    return chunks


def build_configured(config, hf_config: dict[str, Any], groups) -> list[torch.nn.Module]:
    """:func:`build_model` in the layout, dtype and implementation of a run's :class:`megatron_espo.config.Config`.

    Raises:
        InputError: ``megatron.fp8`` without Transformer Engine.
    """
    megatron, dtype = config.megatron, getattr(torch, config.model.dtype)
    if megatron.fp8 and not use_transformer_engine(megatron.transformer_impl):
        raise InputError(f"megatron.fp8: expected null on a machine without GPUs or without Transformer Engine, got {megatron.fp8}; `megatron-espo doctor` tells which")
    return build_model(hf_config, Layout.of(megatron), groups, dtype=dtype, transformer_impl=megatron.transformer_impl)


def _mark_shards(chunk: torch.nn.Module) -> None:
    """Say which weights are shards. Megatron says so while it initializes them, which is skipped here; unmarked ones it takes for copies, and the
    gradient's norm, by which it clips, would count the first tensor-parallel rank's only."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

    for module in chunk.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding) and weight is not None:
            if not getattr(weight, "tensor_model_parallel", False):
                set_tensor_model_parallel_attributes(weight, True, int(isinstance(module, RowParallelLinear)), 1)


def rope_arguments(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Rotary arguments of ``GPTModel`` from either generation of Hugging Face's keys."""
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", hf_config.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rotary_base": theta}
    megatron = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if kind != "llama3" or any(rope.get(key, value) != value for key, value in megatron.items()):
        raise InputError(f"config.json: rope parameters: expected none or llama3 with {megatron}, got {rope}")
    return {"rotary_base": theta, "rope_scaling": True, "rope_scaling_factor": rope["factor"]}


def _layer_spec(config, transformer_impl: str, vp_stage: int | None, groups):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    te = use_transformer_engine(transformer_impl)
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=te, normalization="RMSNorm", vp_stage=vp_stage, pp_rank=groups.pp.rank()
    )
    if te:
        return block
    from megatron.core.transformer.moe import moe_utils

    from megatron_espo.mcore.attention import PackedDotProductAttention, RMSNorm

    # Megatron-Core 0.16 does not define the name that its router asks for where Transformer Engine is absent.
    vars(moe_utils).setdefault("te_general_gemm", None)
    block.layer_norm = RMSNorm
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedDotProductAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    return block
