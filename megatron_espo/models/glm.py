"""GLM-4: dense."""

from functools import cached_property
from typing import Any

from megatron_espo.models import mapping as rules
from megatron_espo.models.spec import ModelSpec


class Glm(ModelSpec):
    architecture, model_type = "GlmForCausalLM", "glm"
    defaults = {"attention_bias": True, "partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-7}
    partial_rotary = has_bias_option = True
    dense_mlp = (rules.FUSED_GATE_UP, rules.DOWN)

    def attention_rules(self) -> tuple[rules.ParamRule, ...]:
        has_bias = self.hf_config["attention_bias"]
        return (rules.QKV_WEIGHT, rules.QKV_BIAS) if has_bias else (rules.QKV_WEIGHT,)

    def transformer_arguments(self) -> dict[str, Any]:
        return super().transformer_arguments() | {"rotary_interleaved": True}

    @cached_property
    def sizes(self) -> dict[str, int]:
        return super().sizes | {"gate_up": 2 * self.intermediate_size}


class Glm4(Glm):
    architecture, model_type, post_norms = "Glm4ForCausalLM", "glm4", True
