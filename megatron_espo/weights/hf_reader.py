"""Read single slices of a Hugging Face folder of safetensors files."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from megatron_espo.errors import InputError
from megatron_espo.files import safetensors_header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class CheckpointFolder:
    """The tensors of ``model.safetensors``, or of the files in ``model.safetensors.index.json``.

    Only headers are read until a slice is indexed; then only the bytes of that slice.

    Attributes:
        names: the names of all tensors.

    Raises:
        InputError: no weights, or an unreadable file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: dict[str, tuple[dict[str, Any], Any]] = {}
        index = self.path / INDEX_NAME
        if index.is_file():
            try:
                self._file_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{index}: expected JSON with a 'weight_map' ({error!r}); fetch it again"
                ) from None
        elif (self.path / SINGLE_NAME).is_file():
            self._file_of = dict.fromkeys(self._open(SINGLE_NAME)[0], SINGLE_NAME)
        else:
            raise InputError(
                f"{self.path}: expected {SINGLE_NAME} or {INDEX_NAME}, found neither; convert the "
                "model with transformers: "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"
            )
        self.names = frozenset(self._file_of)

    def get_slice(self, name: str, shape: tuple[int, ...]) -> Any:
        """Return safetensors' lazy slice of a tensor. InputError unless it has this shape."""
        file = self._file_of[name]
        header, tensors = self._open(file)
        if name not in header:
            raise InputError(
                f"{self.path / file}: expected {name!r}, found no such tensor; fetch the file again"
            )
        found = tuple(header[name]["shape"])
        if found != shape:
            raise InputError(
                f"{self.path / file}: {name!r} has shape {found}, config.json implies {shape}; "
                "weights and configuration must come from one model"
            )
        return tensors.get_slice(name)

    def _open(self, file: str) -> tuple[dict[str, Any], Any]:
        if file not in self._files:
            header = safetensors_header(self.path / file)
            self._files[file] = header, safe_open(self.path / file, framework="pt")
        return self._files[file]
