"""Compares the names and shapes of a weight stream with the rollout engine's checkpoint.

vLLM accepts a stream that lacks tensors and keeps the old values. A wrong shape or an unknown name
leaves its model partly loaded. The comparison therefore runs before any weight is sent.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from megatron_espo.errors import InputError
from megatron_espo.files import safetensors_header

_SHOWN = 5


def check_names(announced: Iterable[tuple[str, tuple[int, ...]]], model: str | Path) -> None:
    """Check that ``announced`` (name, shape) pairs are those of the safetensors files in ``model``.

    A tied ``lm_head.weight`` and rotary ``inv_freq`` buffers may be on one side only, because vLLM
    skips them. Without safetensors files only repeated names are an error.

    Raises:
        InputError: names the first tensors that differ.
    """
    announced = list(announced)
    given, expected = dict(announced), _read_shapes(model)
    names = [name for name, _ in announced]
    problems = []
    if len(given) != len(names):
        problems = [f"{name}: announced more than once" for name in given if names.count(name) > 1]
    if expected:
        optional = {name for name in expected if name.endswith("rotary_emb.inv_freq")}
        if _is_tied(model):
            optional.add("lm_head.weight")
        present, known = given.keys() | optional, expected.keys() | optional
        problems += [f"{name}: missing" for name in expected if name not in present]
        problems += [f"{name}: unknown" for name in given if name not in known]
        problems += [
            f"{name}: shape {tuple(shape)}, expected {expected[name]}"
            for name, shape in given.items()
            if expected.get(name, tuple(shape)) != tuple(shape)
        ]
    if problems:
        more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
        raise InputError(
            f"The trainer's weights do not fit the checkpoint in {model}: "
            f"{'; '.join(problems[:_SHOWN])}{more}. Train the model that the engine serves, "
            "or correct the naming table of its family."
        )


def _read_shapes(model: str | Path) -> dict[str, tuple[int, ...]]:
    headers = [safetensors_header(file) for file in sorted(Path(model).glob("*.safetensors"))]
    return {name: tuple(entry["shape"]) for header in headers for name, entry in header.items()}


def _is_tied(model: str | Path) -> bool:
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    text_config = config.get("text_config") or {}
    return bool(config.get("tie_word_embeddings", text_config.get("tie_word_embeddings", False)))
