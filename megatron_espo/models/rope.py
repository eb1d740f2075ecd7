"""Rotary position embedding of a ``config.json``. Standard library only."""

import math
from dataclasses import dataclass, field
from typing import Any

from megatron_espo.errors import InputError

# Megatron-Core's constants of Llama 3.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding.

    Attributes:
        theta: base of the frequencies.
        factor: of Llama 3's scaling; ``None``: not scaled.
        share: share of each head's columns that are rotated, from the first.
        yarn: attributes that Megatron-Core reads from its configuration for YaRN's scaling.
    """

    theta: float
    factor: float | None = None
    share: float = 1.0
    yarn: dict[str, Any] = field(default_factory=dict)

    def model_arguments(self) -> dict[str, Any]:
        """Arguments of Megatron's ``GPTModel``, where they differ from rotary without scaling."""
        found: dict[str, Any] = {"rotary_base": self.theta}
        if self.factor:
            found |= {"rope_scaling": True, "rope_scaling_factor": self.factor}
        if self.share != 1:
            found["rotary_percent"] = self.share
        return found | ({"position_embedding_type": "yarn"} if self.yarn else {})


def read_rope(hf_config: dict[str, Any]) -> Rope:
    """Read the old keys (``rope_theta``, ``rope_scaling``) and transformers 5's
    ``rope_parameters``.

    Raises:
        InputError: a scaling that Megatron-Core does not have.
    """
    new, old = (hf_config.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
    key, rope = ("rope_parameters", new) if new else ("rope_scaling", old)
    expected = f"none, default, yarn, or llama3 with {_LLAMA3}"
    if not isinstance(rope, dict):
        raise InputError(f"{key}: expected {expected}, got {rope!r}")
    share = rope.get("partial_rotary_factor", hf_config.get("partial_rotary_factor")) or 1.0
    theta = rope.get("rope_theta") or hf_config.get("rope_theta") or 10000.0
    kind, factor = rope.get("rope_type", rope.get("type", "default")), rope.get("factor")
    if kind == "default":
        return Rope(theta, share=share)
    is_number = isinstance(factor, int | float) and factor > 1
    if kind == "yarn" and is_number and rope.get("original_max_position_embeddings"):
        return Rope(theta, share=share, yarn=_yarn(rope))
    is_known = kind == "llama3" and isinstance(factor, int | float)
    if not is_known or any(rope.get(name, value) != value for name, value in _LLAMA3.items()):
        raise InputError(f"{key}: expected {expected}, got {rope}")
    return Rope(theta, factor, share)


def _yarn(rope: dict[str, Any]) -> dict[str, Any]:
    """Megatron's attributes, with the defaults of transformers."""
    growth = 0.1 * math.log(rope["factor"])
    attention, scale, scale_all = growth + 1, rope.get("mscale"), rope.get("mscale_all_dim")
    if scale and scale_all:
        attention = (growth * scale + 1) / (growth * scale_all + 1)
    attention = rope.get("attention_factor") or attention
    return {
        "yarn_rotary_scaling_factor": float(rope["factor"]),
        "yarn_original_max_position_embeddings": rope["original_max_position_embeddings"],
        "yarn_beta_fast": rope.get("beta_fast") or 32,
        "yarn_beta_slow": rope.get("beta_slow") or 1,
        # Megatron computes (growth * mscale + 1) / (growth * mscale_all_dim + 1).
        "yarn_mscale": (attention - 1) / growth,
        "yarn_mscale_all_dim": 0.0,
        "yarn_correction_range_round_to_int": rope.get("truncate", True),
    }
