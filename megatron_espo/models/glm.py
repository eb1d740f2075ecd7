"""GLM-4 (dense), GLM-4.5."""

from typing import Any

from megatron_espo.models import mapping as rules
from megatron_espo.models.moe import SharedExpertsModel
from megatron_espo.models.spec import ModelSpec


class Glm(ModelSpec):
    architecture, model_type = "GlmForCausalLM", "glm"
    defaults = {"attention_bias": True, "partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-7}
    partial_rotary = has_bias_option = True
    dense_mlp = (rules.FUSED_GATE_UP, rules.DOWN)

    def transformer_arguments(self) -> dict[str, Any]:
        return super().transformer_arguments() | {"rotary_interleaved": True}


class Glm4(Glm):
    architecture, model_type, post_norms = "Glm4ForCausalLM", "glm4", True


class Glm4Moe(SharedExpertsModel):
    architecture, model_type = "Glm4MoeForCausalLM", "glm4_moe"
    defaults = SharedExpertsModel.defaults | {
        "attention_bias": False, "use_qk_norm": False, "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
    }  # fmt: skip
    partial_rotary = has_bias_option = True

    def attention_rules(self) -> tuple[rules.ParamRule, ...]:
        norms = (rules.Q_NORM, rules.K_NORM) if self.hf_config["use_qk_norm"] else ()
        return (*super().attention_rules(), *norms)
