"""Rotary position embedding of a ``config.json``. Standard library only."""

from dataclasses import dataclass
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
    """Base of the frequencies, and the factor of Llama 3's scaling (``None``: not scaled)."""

    theta: float
    factor: float | None


def read_rope(hf_config: dict[str, Any]) -> Rope:
    """Read the old keys (``rope_theta``, ``rope_scaling``) and transformers 5's
    ``rope_parameters``.

    Raises:
        InputError: a scaling that Megatron-Core does not have.
    """
    new, old = (hf_config.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
    key, rope = ("rope_parameters", new) if new else ("rope_scaling", old)
    expected = f"none, default, or llama3 with {_LLAMA3}"
    if not isinstance(rope, dict):
        raise InputError(f"config.json: {key}: expected {expected}, got {rope!r}")
    share = rope.get("partial_rotary_factor", hf_config.get("partial_rotary_factor"))
    if share not in (None, 1):
        raise InputError(f"config.json: partial_rotary_factor: expected 1, got {share}")
    theta = rope.get("rope_theta") or hf_config.get("rope_theta") or 10000.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return Rope(theta, None)
    is_known = kind == "llama3" and isinstance(rope.get("factor"), int | float)
    if not is_known or any(rope.get(name, value) != value for name, value in _LLAMA3.items()):
        raise InputError(f"config.json: {key}: expected {expected}, got {rope}")
    return Rope(theta, rope["factor"])
