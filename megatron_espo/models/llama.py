"""Llama 2 and 3, Mistral."""

from megatron_espo.models.spec import ModelSpec


class Llama(ModelSpec):
    architecture, model_type = "LlamaForCausalLM", "llama"


class Mistral(ModelSpec):
    architecture, model_type = "MistralForCausalLM", "mistral"
