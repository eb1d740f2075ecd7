"""Weight sources as vLLM's own classes. This module imports vLLM; nothing else in this package does."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.m2n_common import REPLICATED, M2NMesh, M2NParamMeta
from vllm.distributed.weight_transfer.m2n_source import M2NWeightSource

from megatron_espo.rollout.checksum import tensor_checksum
from megatron_espo.weights import source
from megatron_espo.weights.lockstep import RankLostError


class MegatronWeightSource(source.MegatronWeightSource, WeightSource):
    """The same stream for a transport that asks for vLLM's types."""

    def metadata(self) -> list[ParamMeta]:
        """As in the parent, as vLLM's ``ParamMeta``."""
        return [ParamMeta(item.name, item.dtype, item.shape) for item in super().metadata()]


class GatherError(RuntimeError):
    """The trainer's side of the stream failed; the message names the layer."""


class ObservedSource(M2NWeightSource):
    """A source that knows where it is: for error messages, checksums and times. Every tensor passes through untouched.

    For ``nccl_m2n`` every tensor counts as replicated: each trainer rank gathers the whole.

    Args:
        inner: any weight source.
        ranks: trainer ranks.

    Attributes:
        current: first name of the group that was gathered last; None before the first.
        checksums: ``tensor_checksum`` by name, filled while iterating; None to skip them.
        seconds: spent in the inner source's gathers since the last ``iter_groups``.
    """

    def __init__(self, inner: Any, ranks: int) -> None:
        self._inner, self._ranks = inner, ranks
        self.current: str | None = None
        self.checksums: dict[str, int] | None = None
        self.seconds = 0.0
        self._iterator: Iterator | None = None

    def mesh(self) -> M2NMesh:
        return M2NMesh((self._ranks, 1), 0)

    def metadata(self) -> list[M2NParamMeta]:
        return [M2NParamMeta(item.name, item.dtype, item.shape, REPLICATED) for item in self._inner.metadata()]

    def held_names(self) -> set[str] | None:
        return self._inner.held_names()

    def groups(self) -> list[list[str]]:
        return self._inner.groups()

    def iter_groups(self) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
        self.current, self.seconds = None, 0.0
        self._iterator = self._observed()
        return self._iterator

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for names, tensors in self.iter_groups():
            yield from zip(names, tensors, strict=True)

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Whatever the body raises, exactly one pass has run to its end then: other ranks are inside its collectives."""
        self._iterator = None
        try:
            yield
        finally:
            for _ in self._iterator or self.iter_groups():
                pass

    def _observed(self) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
        groups = self._inner.iter_groups()
        while True:
            began = time.perf_counter()
            try:
                names, tensors = next(groups)
            except StopIteration:
                return
            except RankLostError:
                raise
            except Exception as error:
                after = f"after the group of {self.current}" if self.current else "at the first group"
                notes = "; ".join(getattr(error, "__notes__", []))
                raise GatherError(f"{after}: {type(error).__name__}: {error}{notes and f' ({notes})'}") from error
            self.seconds += time.perf_counter() - began
            self.current = names[0]
            if self.checksums is not None:
                held = ((n, t) for n, t in zip(names, tensors, strict=True) if t is not None)
                self.checksums.update((name, tensor_checksum(tensor)) for name, tensor in held)
            yield names, tensors
            del tensors
