"""Models whose tokens take shared experts beside the routed ones, after dense first layers."""

from collections.abc import Iterator
from typing import Any

from megatron_espo.models.spec import Experts, ModelSpec


class SharedExpertsModel(ModelSpec):
    """Sigmoid routing weights. A fixed bias (``e_score_correction_bias``) helps to choose experts.

    vLLM gives these models a separate output layer.

    Attributes:
        is_biased: whether routing is as above; else it is a softmax over all experts.
    """

    is_biased = True

    required = (
        *ModelSpec.required, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size",
    )  # fmt: skip
    defaults = {
        "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": True, "routed_scaling_factor": 1.0,
    }  # fmt: skip

    @classmethod
    def problems(cls, hf: dict[str, Any]) -> Iterator[str]:
        found = list(super().problems(hf))
        yield from found or cls.router_problems(hf)
        if hf.get("tie_word_embeddings"):
            yield f"tie_word_embeddings: expected false for {cls.architecture}, got true"

    @classmethod
    def router_problems(cls, hf: dict[str, Any]) -> Iterator[str]:
        """Yield what Megatron-Core's router does not compute."""
        per_token, best = hf["num_experts_per_tok"], hf["topk_group"]
        normalized = hf["norm_topk_prob"]
        if cls.is_biased and (not normalized or per_token == 1):
            expected = "true, and num_experts_per_tok above 1: Megatron-Core normalizes sigmoids"
            yield f"norm_topk_prob: expected {expected}, got {normalized} and {per_token}"
        if (hf["n_group"] or 1) > 1 and per_token // best != 2:
            # Megatron-Core ranks groups by their best per_token // topk_group experts.
            expected = f"half of num_experts_per_tok ({per_token})"
            yield f"topk_group: expected {expected} with n_group {hf['n_group']}, got {best}"

    @classmethod
    def read_experts(cls, hf: dict[str, Any]) -> Experts:
        return Experts(
            count=hf["n_routed_experts"],
            per_token=hf["num_experts_per_tok"],
            ffn=hf["moe_intermediate_size"],
            normalized=hf["norm_topk_prob"],
            layers=tuple(i >= hf["first_k_dense_replace"] for i in range(hf["num_hidden_layers"])),
            shared_ffn=hf["moe_intermediate_size"] * (hf["n_shared_experts"] or 0),
            is_biased=cls.is_biased,
            groups=hf["n_group"] or 1,
            top_groups=hf["topk_group"] or 1,
            scale=hf["routed_scaling_factor"],
        )
