"""Tiny Hugging Face models with random tensors, norms and biases included."""

import json
import re
from pathlib import Path
from typing import Any

import torch

from megatron_espo.models.mapping import EXPERT_BIAS
from megatron_espo.models.registry import read_spec
from megatron_espo.models.spec import ModelSpec

SIZES = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
}
LATENT = SHARED | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
}
FAMILIES = {
    "llama": {},
    "llama_tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "qwen3_yarn": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16, "attention_bias": True},
    "glm4_moe": SHARED | {"head_dim": 16, "attention_bias": True, "use_qk_norm": True},
    "deepseek_v2": LATENT
    | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "deepseek_v3": LATENT
    | {
        "q_lora_rank": 16,
        "n_group": 2,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 0.7,
            "mscale_all_dim": 1.3,
        },
    },
    "qwen3_moe": MOE | {"norm_topk_prob": True},
    "qwen3_moe_mixed": MOE
    | {"norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
}


def make_model(family: str, **changes: Any) -> torch.nn.Module:
    """Return a float32 model on the CPU in eval mode, determined by the arguments."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type = re.sub("_(tied|mixed|yarn)$", "", family)
    config = AutoConfig.for_model(model_type, **(SIZES | FAMILIES[family] | changes))
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    model.config.architectures = [type(model).__name__]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1))
        for bias in expert_biases(model).values():
            bias.copy_(torch.randn_like(bias) * 0.1)
    return model.eval()


def expert_biases(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The routers' biases, which are buffers."""
    return {name: b for name, b in model.named_buffers() if name.endswith(EXPERT_BIAS)}


def checkpoint_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of the model, by name."""
    return per_expert(dict(model.named_parameters()) | expert_biases(model))


def save_model(family: str, folder: str | Path, **changes: Any) -> torch.nn.Module:
    """Write ``make_model`` to a folder (``max_shard_size`` limits its files) and return it."""
    max_shard_size = changes.pop("max_shard_size", "1GB")
    model = make_model(family, **changes)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def per_expert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Split transformers' stacked experts of a layer into a checkpoint's tensors."""
    answer = {}
    for name, tensor in tensors.items():
        prefix, _, kind = name.rpartition(".experts.")
        if not prefix:
            answer[name] = tensor
            continue
        for i, matrix in enumerate(tensor):
            parts = kind.removesuffix("_proj").split("_")  # gate and up, or down
            for part, rows in zip(parts, matrix.chunk(len(parts)), strict=True):
                answer[f"{prefix}.experts.{i}.{part}_proj.weight"] = rows
    return answer


def load_spec(folder: str | Path) -> ModelSpec:
    """The model in a folder."""
    return read_spec(json.loads(Path(folder, "config.json").read_text()))
