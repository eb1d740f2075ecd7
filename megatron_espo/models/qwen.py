"""Qwen2 and Qwen2.5, Qwen3, Qwen3-MoE."""

from typing import Any

from megatron_espo.models import mapping as rules
from megatron_espo.models.spec import Experts, ModelSpec


class Qwen2(ModelSpec):
    architecture, model_type, always_windowed = "Qwen2ForCausalLM", "qwen2", False

    def attention_rules(self) -> tuple[rules.ParamRule, ...]:
        return rules.QKV_WEIGHT, rules.QKV_BIAS


class Qwen3(ModelSpec):
    architecture, model_type, always_windowed = "Qwen3ForCausalLM", "qwen3", False

    def attention_rules(self) -> tuple[rules.ParamRule, ...]:
        return rules.QKV_WEIGHT, rules.Q_NORM, rules.K_NORM


class Qwen3Moe(Qwen3):
    architecture, model_type = "Qwen3MoeForCausalLM", "qwen3_moe"
    required = (*Qwen3.required, "num_experts", "num_experts_per_tok", "moe_intermediate_size")

    @classmethod
    def read(cls, hf: dict[str, Any]) -> "Qwen3Moe":
        # transformers 5 writes num_experts under another name.
        return super().read({"num_experts": hf.get("num_local_experts")} | hf)

    @classmethod
    def read_experts(cls, hf: dict[str, Any]) -> Experts:
        step, dense = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
        layers = range(hf["num_hidden_layers"])
        return Experts(
            count=hf["num_experts"],
            per_token=hf["num_experts_per_tok"],
            ffn=hf["moe_intermediate_size"],
            normalized=hf.get("norm_topk_prob", False),
            layers=tuple(i not in dense and (i + 1) % step == 0 for i in layers),
        )
