"""Stream the weights of a user's own exporter (``model.exporter``)."""

from collections.abc import Callable, Iterator
from itertools import groupby

import torch

from megatron_espo.errors import InputError
from megatron_espo.models.mapping import EXPERT_BIAS
from megatron_espo.weights.source import ParameterMetadata, TensorStream

# Yields (Hugging Face name, whole tensor). Each call starts a new pass.
Export = Callable[[], Iterator[tuple[str, torch.Tensor]]]


class ExportedWeightSource(TensorStream):
    """An exporter with the methods of vLLM's ``WeightSource`` (without importing vLLM).

    A user's function (``model.exporter``) is called on every rank at once, with the model chunks
    and the content of ``config.json``. It returns an iterator of (Hugging Face name, whole tensor),
    the same on all ranks, such as Megatron-Bridge's ``bridge.export_hf_weights(chunks)``.

    The constructor runs one pass on all ranks for names and shapes, and sends nothing.

    Args:
        export: see ``Export``; all ranks iterate it together.
        dtype: dtype of the stream; a bias of a router is float32.
    """

    def __init__(self, export: Export, dtype: torch.dtype) -> None:
        self._export, self._dtype = export, dtype
        self._metadata = [
            ParameterMetadata(name, self._dtype_of(name), tuple(tensor.shape))
            for name, tensor in export()
        ]

    def metadata(self) -> list[ParameterMetadata]:
        """Return name, dtype and shape of every tensor, in the exporter's order."""
        return self._metadata

    def held_names(self) -> None:
        """Return None: every rank has all tensors."""
        return None

    def groups(self) -> list[list[str]]:
        """Return consecutive names of one decoder layer, so that no tensor has to wait."""
        names = (meta.name for meta in self._metadata)
        return [list(of_layer) for _, of_layer in groupby(names, key=_layer)]

    def iter_groups(self) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
        """Yield (names, tensors) for each group. InputError if a pass differs from the first."""
        stream = self._export()
        for names in self.groups():
            tensors = []
            for expected in names:
                name, tensor = next(stream, ("nothing", torch.empty(0)))
                if name != expected:
                    raise InputError(
                        f"model.exporter: expected {expected} as in its first pass, got {name}"
                    )
                tensors.append(tensor.detach().to(self._dtype_of(name)))
            yield names, tensors

    def _dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if name.endswith(EXPERT_BIAS) else self._dtype


def _layer(name: str) -> str | None:
    return next((part for part in name.split(".") if part.isdigit()), None)
