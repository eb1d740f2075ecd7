"""Lazy reading of a Hugging Face folder of safetensors files."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_espo.errors import InputError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class CheckpointFolder:
    """The tensors of ``model.safetensors``, or of the files that ``model.safetensors.index.json`` lists.

    Only headers are read until a slice is indexed; then only the bytes of that part.

    Attributes:
        names: the names of all tensors, without reading any.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: dict[str, Any] = {}
        index = self.path / INDEX_NAME
        if index.is_file():
            try:
                self._file_of = dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{index}: expected JSON with a 'weight_map' ({error!r}); fetch it again") from None
        elif (self.path / SINGLE_NAME).is_file():
            self._file_of = dict.fromkeys(self._open(SINGLE_NAME).keys(), SINGLE_NAME)
        else:
            raise InputError(
                f"{self.path}: expected {SINGLE_NAME} or {INDEX_NAME}, found neither; convert the model with "
                "transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"
            )
        self.names = frozenset(self._file_of)

    def check_names(self, expected: Iterable[str], ignored: Iterable[str] = ()) -> None:
        """Raise InputError unless the folder has exactly the expected tensors (and perhaps ignored ones)."""
        expected = set(expected)
        missing = sorted(expected - self.names)
        if missing:
            raise InputError(
                f"{self.path}: tensor {missing[0]!r} is missing ({len(missing)} in all); the folder is incomplete or "
                "its config.json belongs to another model"
            )
        unknown = sorted(self.names - expected - set(ignored))
        if unknown:
            raise InputError(
                f"{self.path}: tensor {unknown[0]!r} has no place in this model family ({len(unknown)} in all) "
                "and would be lost; use a folder that holds this model only"
            )

    def get_slice(self, name: str, shape: tuple[int, ...]) -> Any:
        """A lazily indexed tensor; InputError unless its shape is as given."""
        file = self._file_of[name]
        try:
            source = self._open(file).get_slice(name)
        except SafetensorError as error:
            raise InputError(f"{self.path / file}: cannot read {name!r} ({error}); fetch the file again") from None
        if tuple(source.get_shape()) != shape:
            raise InputError(
                f"{self.path / file}: {name!r} has shape {tuple(source.get_shape())}, config.json implies {shape}; "
                "weights and configuration must come from one model"
            )
        return source

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.path / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InputError(f"{self.path / file}: not readable as safetensors ({error}); fetch it again") from None
        return self._files[file]
