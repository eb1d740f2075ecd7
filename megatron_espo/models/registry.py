"""The model families."""

from typing import Any

from megatron_espo.errors import InputError
from megatron_espo.models.deepseek import DeepseekV2, DeepseekV3
from megatron_espo.models.glm import Glm, Glm4, Glm4Moe
from megatron_espo.models.llama import Llama, Mistral
from megatron_espo.models.qwen import Qwen2, Qwen3, Qwen3Moe
from megatron_espo.models.spec import ModelSpec
from megatron_espo.plugins import load_object

_ALL = (
    Llama, Mistral, Qwen2, Qwen3, Qwen3Moe, Glm, Glm4, Glm4Moe, DeepseekV2, DeepseekV3,
)  # fmt: skip
FAMILIES: dict[str, type[ModelSpec]] = {family.architecture: family for family in _ALL}
"""By the architecture of ``config.json``."""


def read_spec(hf_config: dict[str, Any], family: str | None = None) -> ModelSpec:
    """Read the content of a ``config.json``.

    Args:
        family: the user's own (``model.family``); ``None``: by its architecture.

    Raises:
        InputError: an unknown architecture, or every problem of the file, one a line.
    """
    if family:
        return load_object("model.family", family).read(hf_config)
    architectures = hf_config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    if architecture not in FAMILIES:
        raise InputError(
            f"config.json: architectures: expected one of {', '.join(FAMILIES)}, got "
            f"{architecture}; model.family adds your own"
        )
    return FAMILIES[architecture].read(hf_config)
