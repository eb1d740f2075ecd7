"""Does a stream of weights fit the checkpoint that the rollout engine was built from? Standard library only.

vLLM accepts a stream that lacks tensors and keeps the old values there; a wrong shape or an unknown name leaves its
model half loaded. So names and shapes are compared before the first byte is sent.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from megatron_espo.errors import InputError

_SHOWN = 5


def read_checkpoint_shapes(model: str | Path) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a Hugging Face folder, from the headers of its safetensors files.

    Empty where the folder has no safetensors file (a configuration without weights).
    """
    shapes = {}
    for file in sorted(Path(model).glob("*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        shapes.update((name, tuple(entry["shape"])) for name, entry in header.items() if name != "__metadata__")
    return shapes


def check_names(announced: Iterable[tuple[str, tuple[int, ...]]], model: str | Path) -> None:
    """Raise ``InputError`` unless the announced (name, shape) pairs are those of the checkpoint in ``model``.

    A tied ``lm_head.weight`` and rotary ``inv_freq`` buffers may be present on one side only: vLLM skips both.
    Nothing is known, and nothing checked but repeated names, where the folder has no safetensors file.
    """
    announced = list(announced)
    given = dict(announced)
    expected = read_checkpoint_shapes(model)
    problems = []
    if len(given) != len(announced):
        names = [name for name, _ in announced]
        problems += [f"{name}: announced more than once" for name in given if names.count(name) > 1]
    if expected:
        optional = {name for name in expected if name.endswith("rotary_emb.inv_freq")}
        if _is_tied(model):
            optional.add("lm_head.weight")
        problems += [f"{name}: missing" for name in expected if name not in given and name not in optional]
        problems += [f"{name}: unknown" for name in given if name not in expected and name not in optional]
        problems += [
            f"{name}: shape {tuple(shape)}, expected {expected[name]}"
            for name, shape in given.items()
            if name in expected and tuple(shape) != expected[name]
        ]
    if problems:
        more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
        raise InputError(
            f"The trainer's weights do not fit the checkpoint in {model}: {'; '.join(problems[:_SHOWN])}{more}. "
            "Train the model that the rollout engine serves, or correct the naming table of its family."
        )


def _is_tied(model: str | Path) -> bool:
    config = json.loads((Path(model) / "config.json").read_text())
    text_config = config.get("text_config") or {}
    return bool(config.get("tie_word_embeddings", text_config.get("tie_word_embeddings", False)))
