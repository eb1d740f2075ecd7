"""Read single slices of a Hugging Face folder of safetensors files."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import safe_open

from megatron_espo.config.model_folder import stored_tensors, weight_problems
from megatron_espo.errors import InputError


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
        for problem in weight_problems(self.path):
            raise InputError(problem)
        self._file_of, _ = stored_tensors(self.path)
        self._open = lru_cache(None)(lambda file: safe_open(file, framework="pt"))
        self.names = frozenset(self._file_of)

    def get_slice(self, name: str) -> Any:
        """Return safetensors' lazy slice of a tensor."""
        return self._open(self._file_of[name]).get_slice(name)
