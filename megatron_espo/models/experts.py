"""Mixture-of-experts settings of a ``config.json``. Standard library only."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Experts:
    """Routed experts of a model.

    Attributes:
        count: experts per layer.
        per_token: experts per token.
        ffn: feed-forward columns of one expert.
        normalized: whether the routing weights of a token sum to one (``norm_topk_prob``).
        layers: for each decoder layer, whether it has experts or a dense feed-forward.
    """

    count: int
    per_token: int
    ffn: int
    normalized: bool
    layers: tuple[bool, ...]


def read_experts(hf_config: dict[str, Any]) -> Experts | None:
    """Experts of a model, ``None`` if it is dense. Defaults are those of ``Qwen3MoeConfig``."""
    # transformers 5 uses the second name.
    count = hf_config.get("num_experts") or hf_config.get("num_local_experts")
    if not count:
        return None
    step, dense = hf_config.get("decoder_sparse_step", 1), hf_config.get("mlp_only_layers") or []
    return Experts(
        count=count,
        per_token=hf_config.get("num_experts_per_tok", 8),
        ffn=hf_config["moe_intermediate_size"],
        normalized=hf_config.get("norm_topk_prob", False),
        layers=tuple(
            i not in dense and (i + 1) % step == 0 for i in range(hf_config["num_hidden_layers"])
        ),
    )


def replays_router(rollout: Any, hf_config: dict[str, Any]) -> bool:
    """Whether routers reuse the engine's choices. ``rollout`` is that section of the settings."""
    return rollout.router_replay and read_experts(hf_config) is not None
