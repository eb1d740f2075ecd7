"""What a ``config.json`` says about mixture-of-experts layers. Standard library only."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Experts:
    """Routed experts of a model.

    Attributes:
        count: experts in each layer that has any.
        per_token: experts that each token goes to.
        ffn: feed-forward columns of one expert.
        normalized: whether a token's routing weights sum to one over its experts (``norm_topk_prob``).
        layers: for each decoder layer whether it has experts; the others have a dense feed-forward.
    """

    count: int
    per_token: int
    ffn: int
    normalized: bool
    layers: tuple[bool, ...]


def read_experts(hf_config: dict[str, Any]) -> Experts | None:
    """The experts of a model, ``None`` for a dense one. Defaults are those of transformers' ``Qwen3MoeConfig``."""
    # transformers 5 writes the second name.
    count = hf_config.get("num_experts") or hf_config.get("num_local_experts")
    if not count:
        return None
    step, dense = hf_config.get("decoder_sparse_step", 1), hf_config.get("mlp_only_layers") or []
    return Experts(
        count=count,
        per_token=hf_config.get("num_experts_per_tok", 8),
        ffn=hf_config["moe_intermediate_size"],
        normalized=hf_config.get("norm_topk_prob", False),
        layers=tuple(i not in dense and (i + 1) % step == 0 for i in range(hf_config["num_hidden_layers"])),
    )


def replays_router(rollout: Any, hf_config: dict[str, Any]) -> bool:
    """Whether a run's routers reuse the engine's choices, given the ``rollout`` section and the model's ``config.json``."""
    return rollout.router_replay and read_experts(hf_config) is not None
