"""DeepSeek-V2-Lite and DeepSeek-V3: multi-head latent attention."""

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar

from megatron_espo.models import mapping as rules
from megatron_espo.models.moe import SharedExpertsModel
from megatron_espo.models.rope import read_rope

_HEAD_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def _linear(name: str, theirs: str, shape: str) -> rules.ParamRule:
    ours, layout = f"self_attention.linear_{name}.weight", rules.ShardLayout.COLUMN
    return rules.make_rule(layout, ours, {f"self_attn.{theirs}.weight": shape})


_QUERY = (_linear("q_proj", "q_proj", "query hidden"),)
_LATENT_QUERY = (
    _linear("q_down_proj", "q_a_proj", "q_rank hidden"),
    rules.make_norm("self_attention.q_layernorm.weight", "self_attn.q_a_layernorm", "q_rank"),
    _linear("q_up_proj", "q_b_proj", "query q_rank"),
)
_KEY_VALUE = (
    _linear("kv_down_proj", "kv_a_proj_with_mqa", "kv_down hidden"),
    rules.make_norm("self_attention.kv_layernorm.weight", "self_attn.kv_a_layernorm", "kv_rank"),
    _linear("kv_up_proj", "kv_b_proj", "kv_up kv_rank"),
)


class DeepseekV3(SharedExpertsModel):
    architecture, model_type, is_latent = "DeepseekV3ForCausalLM", "deepseek_v3", True
    required = (*SharedExpertsModel.required, *_HEAD_SIZES)
    router: ClassVar[dict[str, Any]] = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}

    @classmethod
    def router_problems(cls, hf: dict[str, Any]) -> Iterator[str]:
        yield from super().router_problems(hf)
        others = {"moe_layer_freq": 1, "rope_interleave": True, "rms_norm_eps": 1e-6}
        for key, value in (cls.router | others).items():
            if (found := hf.get(key, others.get(key))) != value:
                yield f"{key}: expected {value!r} for {cls.architecture}, got {found!r}"
        rope = read_rope(hf)
        if rope.factor or not rope.yarn.get("yarn_correction_range_round_to_int", True):
            yield "rope_parameters: expected default, or yarn with truncate, for latent attention"

    def attention_rules(self) -> tuple[rules.ParamRule, ...]:
        return (*(_LATENT_QUERY if self.hf_config.get("q_lora_rank") else _QUERY), *_KEY_VALUE)

    def transformer_arguments(self) -> dict[str, Any]:
        hf, yarn = self.hf_config, self.rope.yarn
        found = super().transformer_arguments() | {
            "q_lora_rank": hf.get("q_lora_rank"),
            "kv_lora_rank": hf["kv_lora_rank"],
            "qk_head_dim": hf["qk_nope_head_dim"],
            "qk_pos_emb_head_dim": hf["qk_rope_head_dim"],
            "v_head_dim": hf["v_head_dim"],
            "rotary_base": self.rope.theta,
            "rope_type": "yarn" if yarn else "rope",
        }
        if not yarn:
            return found
        # The scores are scaled by (growth * mscale_all_dim + 1)^2, cosines and sines by
        # (growth * mscale + 1) / (growth * mscale_all_dim + 1).
        rope = hf.get("rope_parameters") or hf["rope_scaling"]
        growth, all_dim = 0.1 * math.log(rope["factor"]), rope.get("mscale_all_dim") or 0.0
        attention = growth * yarn["yarn_mscale"] + 1
        mscale = (attention * (growth * all_dim + 1) - 1) / growth
        same = "rotary_scaling_factor", "original_max_position_embeddings", "beta_fast", "beta_slow"
        found |= {name: yarn[f"yarn_{name}"] for name in same}
        return found | {"mscale": mscale, "mscale_all_dim": all_dim}

    @cached_property
    def sizes(self) -> dict[str, int]:
        heads = self.num_attention_heads
        rank, nope, rope, value = (self.hf_config[key] for key in _HEAD_SIZES)
        return super().sizes | {
            "query": heads * (nope + rope),
            "key": heads * (nope + rope),
            "value": heads * value,
            "q_rank": self.hf_config.get("q_lora_rank") or 0,
            "kv_rank": rank,
            "kv_down": rank + rope,
            "kv_up": heads * (nope + value),
        }

    def cache_columns(self, gpus: int) -> int:
        return self.sizes["kv_down"]  # one latent vector for all heads, on every GPU


class DeepseekV2(DeepseekV3):
    architecture, model_type, is_biased = "DeepseekV2ForCausalLM", "deepseek_v2", False
    defaults = SharedExpertsModel.defaults | {
        "norm_topk_prob": False, "topk_method": "greedy", "scoring_func": "softmax",
    }  # fmt: skip
    router = {"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False}
