"""Compares the names and shapes of a weight stream with the rollout engine's checkpoint.

vLLM accepts a stream that lacks tensors and keeps the old values. A wrong shape or an unknown name
leaves its model partly loaded. The comparison therefore runs before any weight is sent.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from megatron_espo.config.model_folder import stored_tensors
from megatron_espo.errors import InputError
from megatron_espo.models.spec import is_unused

_SHOWN = 5


def check_names(announced: Iterable[tuple[str, tuple[int, ...]]], model: str | Path) -> None:
    """Check that ``announced`` (name, shape) pairs are those of the weight files in ``model``.

    Tensors that vLLM skips (``is_unused``) are not compared.

    Raises:
        InputError: a file cannot be read, or tensors differ; names the first ones.
    """
    given, (_, entries) = dict(announced), stored_tensors(Path(model))
    expected = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    flat = (config.get("text_config") or {}) | config
    problems = [
        f"{name}: shape {given.get(name, 'missing')}, expected {expected.get(name, 'no tensor')}"
        for name in sorted(given.keys() | expected.keys())
        if given.get(name) != expected.get(name) and not is_unused(flat, name)
    ]
    if problems:
        more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
        raise InputError(
            f"The trainer's weights do not fit the checkpoint in {model}: "
            f"{'; '.join(problems[:_SHOWN])}{more}. Train the model that the engine serves, "
            "or correct the naming table of its family."
        )
