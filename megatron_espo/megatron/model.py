"""Build Megatron-Core's ``GPTModel`` from a Hugging Face ``config.json``."""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F

from megatron_espo.config import Config, Megatron
from megatron_espo.config.checks import ARCHITECTURES
from megatron_espo.distributed.runtime import PARALLEL_SIZES
from megatron_espo.errors import InputError
from megatron_espo.megatron.overrides import check_overrides
from megatron_espo.models.experts import read_experts
from megatron_espo.models.rope import read_rope

# Settings of the ``megatron`` section that ``TransformerConfig`` takes under the same name.
_SHARED_SETTINGS = (
    *PARALLEL_SIZES,
    "sequence_parallel",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "fp8",
    "fp8_recipe",
)


# Arguments with a default here that ``megatron.overrides`` may change.
_TUNABLE = (
    "overlap_p2p_comm",
    "batch_p2p_comm",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "persist_layer_norm",
    "moe_grouped_gemm",
    "moe_permute_fusion",
    "apply_rope_fusion",
    "moe_router_dtype",
    "moe_token_dispatcher_type",
)


def use_transformer_engine(transformer_impl: str) -> bool:
    """Resolve ``auto``: Transformer Engine if there are CUDA and the package, else local layers."""
    if transformer_impl != "auto":
        return transformer_impl == "transformer_engine"
    return torch.cuda.is_available() and bool(importlib.util.find_spec("transformer_engine"))


def transformer_config(hf_config: dict[str, Any], megatron: Megatron, dtype: torch.dtype) -> Any:
    """Return Megatron's ``TransformerConfig`` for a Hugging Face configuration.

    Raises:
        InputError: an unsupported architecture or activation.
    """
    from megatron.core.transformer import TransformerConfig

    architecture = (hf_config.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise InputError(
            f"config.json: architectures: expected one of {supported}, got {architecture}"
        )
    if hf_config.get("hidden_act", "silu") != "silu":
        raise InputError(f"config.json: hidden_act: expected silu, got {hf_config['hidden_act']}")
    qkv_bias, qk_layernorm = ARCHITECTURES[architecture]
    heads = hf_config["num_attention_heads"]
    te = use_transformer_engine(megatron.transformer_impl)
    has_te = bool(importlib.util.find_spec("transformer_engine"))  # not on a machine that plans
    is_interleaved = megatron.virtual_pipeline_model_parallel_size is not None
    arguments = dict(
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
        # The loss has float weights in its numerator. Only this form is not scaled by the schedule.
        calculate_per_token_loss=True,
        # With two stages, each is the next and the previous stage of the other. Only this order of
        # messages keeps those of an interleaved schedule apart.
        overlap_p2p_comm=is_interleaved,
        batch_p2p_comm=not is_interleaved,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,
        bias_activation_fusion=te,
        bias_dropout_fusion=te,
        # Megatron's own output layer takes this kernel from apex.
        gradient_accumulation_fusion=te
        and bool(importlib.util.find_spec("fused_weight_gradient_mlp_cuda")),
        masked_softmax_fusion=te,
        persist_layer_norm=te,
        moe_grouped_gemm=te,
        moe_permute_fusion=te and has_te,
        apply_rope_fusion=te and has_te,
        **moe_arguments(hf_config, megatron.fp8),
    )
    shared = {name: getattr(megatron, name) for name in _SHARED_SETTINGS}
    fixed = {name: "config.json and the other settings give it" for name in arguments}
    fixed |= {name: f"set megatron.{name}" for name in shared}
    fixed = {name: reason for name, reason in fixed.items() if name not in _TUNABLE}
    chosen = check_overrides(megatron.overrides, fixed).transformer
    return TransformerConfig(**arguments | shared | dict(chosen))


def moe_arguments(hf_config: dict[str, Any], fp8: str | None = None) -> dict[str, Any]:
    """Return the ``TransformerConfig`` arguments of a model's experts; empty for a dense model."""
    experts = read_experts(hf_config)
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn,
        # 1 declares a uniform stack, whose checkpoints load in any pipeline layout.
        "moe_layer_freq": 1 if all(experts.layers) else [int(sparse) for sparse in experts.layers],
        "moe_router_topk": experts.per_token,
        # Weights that sum to one over the chosen experts are the softmax over the chosen logits.
        "moe_router_pre_softmax": not experts.normalized,
        "moe_router_dtype": "fp32",
        # A balancing loss would change the weights even where every advantage is zero.
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        # 8-bit matrix products need multiples of 16 tokens an expert.
        "moe_router_padding_for_quantization": bool(fp8),
    }


def build_model(
    hf_config: dict[str, Any],
    megatron: Megatron,
    groups: Any,
    *,
    dtype: torch.dtype = torch.float32,
) -> list[torch.nn.Module]:
    """Build this rank's chunks of Megatron's ``GPTModel``, with uninitialised weights.

    Args:
        hf_config: the parsed ``config.json``.
        megatron: the ``megatron`` section of the configuration.
        groups: Megatron's ``ProcessGroupCollection``.
        dtype: parameter dtype.

    Returns:
        One chunk, or one for each virtual pipeline stage, on the current device.

    Raises:
        InputError: an unsupported model, or ``megatron.fp8`` without Transformer Engine.
    """
    from megatron.core.models.gpt import GPTModel

    te = use_transformer_engine(megatron.transformer_impl)
    if megatron.fp8 and not te:
        raise InputError(
            "megatron.fp8: expected null on a machine without GPUs or without Transformer Engine, "
            f"got {megatron.fp8}; `megatron-espo doctor` tells which"
        )
    config = transformer_config(hf_config, megatron, dtype)
    virtual = megatron.virtual_pipeline_model_parallel_size
    last = (virtual or 1) - 1
    # Every tensor-parallel shard of the embedding has as many rows.
    vocab_size, tp = hf_config["vocab_size"], megatron.tensor_model_parallel_size
    chunks = []
    for stage in range(last + 1):
        vp_stage = stage if virtual else None
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=_layer_spec(config, te, vp_stage, groups),
            vocab_size=-(-vocab_size // tp) * tp,
            max_sequence_length=hf_config["max_position_embeddings"],
            pre_process=groups.pp.rank() == 0 and stage == 0,
            post_process=groups.pp.rank() == groups.pp.size() - 1 and stage == last,
            share_embeddings_and_output_weights=bool(hf_config.get("tie_word_embeddings")),
            position_embedding_type="rope",
            pg_collection=groups,
            vp_stage=vp_stage,
            **rope_arguments(hf_config),
        )
        if not te:
            from megatron_espo.megatron.attention import SharedPrefixRotary

            chunk.rotary_pos_emb = SharedPrefixRotary(chunk.rotary_pos_emb)
        chunks.append(chunk.cuda())
    return chunks


def build_configured(config: Config, hf_config: dict[str, Any], groups: Any) -> list:
    """Call :func:`build_model` with a run's configuration."""
    dtype = getattr(torch, config.model.dtype)
    return build_model(hf_config, config.megatron, groups, dtype=dtype)


def rope_arguments(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Return ``GPTModel``'s rotary arguments, from old or new Hugging Face keys."""
    rope = read_rope(hf_config)
    if rope.factor is None:
        return {"rotary_base": rope.theta}
    return {"rotary_base": rope.theta, "rope_scaling": True, "rope_scaling_factor": rope.factor}


def _layer_spec(config: Any, te: bool, vp_stage: int | None, groups: Any) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=te,
        normalization="RMSNorm",
        vp_stage=vp_stage,
        pp_rank=groups.pp.rank(),
    )
    if te:
        return block
    from megatron_espo.megatron.attention import PackedDotProductAttention, RMSNorm

    block.layer_norm = RMSNorm
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedDotProductAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    return block
