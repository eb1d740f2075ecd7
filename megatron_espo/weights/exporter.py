"""A user's own exporter (``model.exporter``) as the stream of weights."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch

from megatron_espo.errors import InputError
from megatron_espo.weights.source import ParameterMetadata

# Yields (Hugging Face name, whole tensor); starts a fresh pass on every call.
Export = Callable[[], Iterator[tuple[str, torch.Tensor]]]


def load_exporter(name: str, chunks: Sequence[torch.nn.Module], hf_config: dict[str, Any]) -> Export:
    """``module:function`` bound to this rank's model.

    The function is called as ``function(chunks, hf_config)`` on every rank at once and returns an iterator of (Hugging
    Face name, whole tensor), the same on all; such as Megatron-Bridge's ``bridge.export_hf_weights(chunks)``.

    Raises:
        InputError: no such function. What the import itself raises passes through.
    """
    module_name, _, attribute = name.partition(":")
    function = getattr(importlib.import_module(module_name), attribute, None)
    if not callable(function):
        raise InputError(f"model.exporter: expected module:function, got {name!r}, where {module_name} has no such function")
    return partial(function, chunks, hf_config)


class ExportedWeightSource:
    """An exporter with the methods of vLLM's ``WeightSource`` (without importing vLLM).

    Names and shapes come from one dry pass on construction, on all ranks, which sends nothing.

    Args:
        export: see ``Export``; all ranks iterate it in lockstep.
        dtype: of the stream; tensors are cast before they are sent.
    """

    participates = True

    def __init__(self, export: Export, dtype: torch.dtype) -> None:
        self._export, self._dtype = export, dtype
        self._metadata = [ParameterMetadata(name, dtype, tuple(tensor.shape)) for name, tensor in export()]

    def metadata(self) -> list[ParameterMetadata]:
        return self._metadata

    def held_names(self) -> None:
        return None

    def groups(self) -> list[list[str]]:
        """Neighbours of one decoder layer, in the exporter's order, so that nothing has to be kept back."""
        return [list(names) for _, names in groupby((meta.name for meta in self._metadata), key=_layer)]

    def iter_groups(self) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
        """Yield (names, tensors) for each group. InputError where a pass differs from the first one."""
        stream = self._export()
        for names in self.groups():
            tensors = []
            for expected in names:
                name, tensor = next(stream, ("nothing", None))
                if name != expected:
                    raise InputError(f"model.exporter: expected {expected} as in its first pass, got {name}")
                tensors.append(tensor.detach().to(self._dtype))
            yield names, tensors


def _layer(name: str) -> str | None:
    return next((part for part in name.split(".") if part.isdigit()), None)
