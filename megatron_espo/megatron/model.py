"""Build Megatron-Core's ``GPTModel`` of a ``ModelSpec``."""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F

from megatron_espo.config import Config, Megatron
from megatron_espo.distributed.runtime import PARALLEL_SIZES
from megatron_espo.errors import InputError
from megatron_espo.megatron import attention
from megatron_espo.megatron.overrides import check_overrides
from megatron_espo.models.spec import ExternalSpec, ModelSpec

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

# Arguments of experts that ``megatron.overrides`` may change.
_TUNABLE = ("moe_router_dtype", "moe_token_dispatcher_type")


def use_transformer_engine(transformer_impl: str) -> bool:
    """Resolve ``auto``: Transformer Engine if there are CUDA and the package, else local layers."""
    if transformer_impl != "auto":
        return transformer_impl == "transformer_engine"
    return torch.cuda.is_available() and bool(importlib.util.find_spec("transformer_engine"))


def transformer_config(spec: ModelSpec, megatron: Megatron, dtype: torch.dtype) -> Any:
    """Return Megatron's ``TransformerConfig`` of a model."""
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    arguments = spec.transformer_arguments() | {"activation_func": F.silu}
    if spec.experts:  # 8-bit matrix products need multiples of 16 tokens an expert
        arguments["moe_router_padding_for_quantization"] = bool(megatron.fp8)
    # Transformer Engine's kernel ignores YaRN's factor of the attention, and latent attention.
    if spec.rope.yarn or spec.is_latent:
        arguments["apply_rope_fusion"] = False
    kind = MLATransformerConfig if spec.is_latent else TransformerConfig
    config = kind(**run_arguments(arguments, megatron, dtype))
    for name, value in spec.rope.yarn.items():  # GPTModel reads them, and no argument sets them
        setattr(config, name, value)
    return config


def run_arguments(
    arguments: dict[str, Any], megatron: Megatron, dtype: torch.dtype
) -> dict[str, Any]:
    """Add the run's settings to the model's arguments of ``TransformerConfig``, and the overrides.

    Raises:
        InputError: an override of one of ``arguments`` or of a setting, or of no field.
    """
    te = use_transformer_engine(megatron.transformer_impl)
    has_te = bool(importlib.util.find_spec("transformer_engine"))  # not on a machine that plans
    is_interleaved = megatron.virtual_pipeline_model_parallel_size is not None
    defaults = dict(
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
    )
    shared = {name: getattr(megatron, name) for name in _SHARED_SETTINGS}
    given = arguments.keys() - set(_TUNABLE)
    fixed = dict.fromkeys(given, "config.json and the other settings give it")
    fixed |= {name: f"set megatron.{name}" for name in shared}
    return defaults | arguments | shared | check_overrides(megatron.overrides, fixed)[0]


def build_model(
    spec: ModelSpec, megatron: Megatron, groups: Any, *, dtype: torch.dtype = torch.float32
) -> list[torch.nn.Module]:
    """Build this rank's chunks of Megatron's ``GPTModel``, with uninitialised weights.

    Args:
        spec: the model.
        megatron: the ``megatron`` section of the configuration.
        groups: Megatron's ``ProcessGroupCollection``.
        dtype: parameter dtype.

    Returns:
        One chunk, or one for each virtual pipeline stage, on the current device.

    Raises:
        InputError: ``megatron.fp8`` without Transformer Engine.
    """
    from megatron.core.models.gpt import GPTModel

    te = use_transformer_engine(megatron.transformer_impl)
    if megatron.fp8 and not te:
        raise InputError(
            "megatron.fp8: expected null on a machine without GPUs or without Transformer Engine, "
            f"got {megatron.fp8}; `megatron-espo doctor` tells which"
        )
    config = transformer_config(spec, megatron, dtype)
    virtual = megatron.virtual_pipeline_model_parallel_size
    last = (virtual or 1) - 1
    # Every tensor-parallel shard of the embedding has as many rows.
    vocab_size, tp = spec.vocab_size, megatron.tensor_model_parallel_size
    # Latent attention has the rotary embedding in its layers.
    rope = {} if spec.is_latent else spec.rope.model_arguments()
    chunks = []
    for stage in range(last + 1):
        vp_stage = stage if virtual else None
        block = layer_spec(spec, config, te, vp_stage, groups)
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=block,
            vocab_size=-(-vocab_size // tp) * tp,
            max_sequence_length=spec.max_position_embeddings,
            pre_process=groups.pp.rank() == 0 and stage == 0,
            post_process=groups.pp.rank() == groups.pp.size() - 1 and stage == last,
            share_embeddings_and_output_weights=spec.tie_word_embeddings,
            pg_collection=groups,
            vp_stage=vp_stage,
            **({"position_embedding_type": "rope"} | rope),
        )
        if spec.experts and spec.experts.is_biased:
            _freeze_expert_bias(chunk)
        if spec.post_norms:
            attention.add_post_norms(chunk.decoder.layers, block.layer_norm)
        if not te and not spec.is_latent:
            chunk.rotary_pos_emb = attention.SharedPrefixRotary(chunk.rotary_pos_emb)
        chunks.append(chunk.cuda())
    return chunks


def _freeze_expert_bias(chunk: torch.nn.Module) -> None:
    """Make the routers' biases parameters without a gradient.

    Megatron has them as buffers and changes them by the experts' load after each step, which would
    change the policy without an advantage. As parameters they are loaded, compared, saved and sent
    with the weights.
    """
    modules: Any = chunk.modules()
    for module in modules:
        if getattr(module, "enable_expert_bias", False):
            module.frozen_expert_bias = True
            bias = module._buffers.pop("expert_bias")
            module.expert_bias = torch.nn.Parameter(bias, requires_grad=False)


def build_configured(config: Config, spec: ModelSpec, groups: Any) -> list:
    """Call :func:`build_model` with a run's configuration, or the model's own builder."""
    dtype = getattr(torch, config.model.dtype)
    if isinstance(spec, ExternalSpec):
        arguments = run_arguments({}, config.megatron, dtype)
        return spec.build(config.model.path, arguments, groups)
    return build_model(spec, config.megatron, groups, dtype=dtype)


def layer_spec(spec: ModelSpec, config: Any, te: bool, vp_stage: int | None, groups: Any) -> Any:
    """Return Megatron's specification of this stage's decoder layers."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=te,
        normalization="RMSNorm",
        vp_stage=vp_stage,
        pp_rank=groups.pp.rank(),
    )
    norm = block.layer_norm = block.layer_norm if te else attention.RMSNorm
    # One object may stand for several layers.
    for layer in {id(layer): layer for layer in block.layer_specs}.values():
        if not te:
            layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = norm
            parts = layer.submodules.self_attention.submodules
            parts.core_attention = attention.PackedDotProductAttention
            if config.qk_layernorm:
                parts.q_layernorm = parts.k_layernorm = norm
        if spec.is_latent:
            attention.use_latent_attention(layer, norm)
        spec.change_layer(layer)
    return block
