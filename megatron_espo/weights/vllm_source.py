"""Weight sources as subclasses of vLLM's classes. Only this module of the folder imports vLLM."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.m2n_common import REPLICATED, M2NMesh, M2NParamMeta
from vllm.distributed.weight_transfer.m2n_source import M2NWeightSource

from megatron_espo.distributed.checksum import tensor_checksum, tensor_sketch
from megatron_espo.distributed.monitored_barrier import RankLostError
from megatron_espo.weights.source import TensorStream, WeightGatherer


class MegatronWeightSource(WeightGatherer, WeightSource):  # type: ignore[misc]
    """The stream of :class:`WeightGatherer` with vLLM's types."""

    def metadata(self) -> list[ParamMeta]:  # type: ignore[override]
        """Return the parent's metadata as vLLM's ``ParamMeta``."""
        return [ParamMeta(item.name, item.dtype, item.shape) for item in super().metadata()]


class GatherError(RuntimeError):
    """The trainer failed to gather the weights. The message names the layer."""


class ObservedSource(TensorStream, M2NWeightSource):  # type: ignore[misc]
    """Records position, checksums and time of another source's stream. Tensors are not changed.

    For ``nccl_m2n`` every tensor counts as replicated: each trainer rank gathers the whole model.

    Args:
        inner: any weight source.
        ranks: number of trainer ranks.

    Attributes:
        current: first name of the group that was gathered last; None before the first.
        checksums: ``tensor_checksum`` by name, filled while iterating; None: not computed.
        sketches: norm and ``tensor_sketch`` of each matrix in the same way.
    """

    def __init__(self, inner: Any, ranks: int) -> None:
        self._inner, self._ranks = inner, ranks
        self.current: str | None = None
        self.checksums: dict[str, int] | None = None
        self.sketches: dict[str, tuple[float, list[float]]] | None = None
        self._iterator: Iterator | None = None

    def mesh(self) -> M2NMesh:
        """Return one row of all trainer ranks."""
        return M2NMesh((self._ranks, 1), 0)

    def metadata(self) -> list[M2NParamMeta]:  # type: ignore[override]
        """Return the inner source's metadata, every tensor replicated."""
        inner = self._inner.metadata()
        return [M2NParamMeta(item.name, item.dtype, item.shape, REPLICATED) for item in inner]

    def held_names(self) -> set[str] | None:
        """Return the inner source's names."""
        return self._inner.held_names()

    def groups(self) -> list[list[str]]:
        """Return the inner source's groups."""
        return self._inner.groups()

    def iter_groups(self) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
        """Start a pass over the inner source. Collective, as the inner source."""
        self.current = None
        self._iterator = self._observed()
        return self._iterator

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Complete one pass even if the body raises: other ranks are in its collectives."""
        self._iterator = None
        try:
            yield
        finally:
            for _ in self._iterator or self.iter_groups():
                pass

    def _observed(self) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
        try:
            for names, tensors in self._inner.iter_groups():
                self.current = names[0]
                self._record(names, tensors)
                yield names, tensors
                del tensors  # free them before the next group is gathered
        except RankLostError:
            raise
        except Exception as error:
            where = f"after the group of {self.current}" if self.current else "first group"
            notes = "; ".join(getattr(error, "__notes__", []))
            what = f"{type(error).__name__}: {error}{notes and f' ({notes})'}"
            raise GatherError(f"{where}: {what}") from error

    def _record(self, names: list[str], tensors: list[torch.Tensor]) -> None:
        for name, tensor in zip(names, tensors, strict=True):
            if tensor is not None and self.checksums is not None:
                self.checksums[name] = tensor_checksum(tensor)
            if tensor is not None and tensor.dim() > 1 and self.sketches is not None:
                norm = float(torch.linalg.vector_norm(tensor, dtype=torch.float32))
                self.sketches[name] = norm, tensor_sketch(tensor).tolist()
