"""Measure how evenly routers distribute tokens over experts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter

from megatron_espo.models.spec import ModelSpec


class ExpertLoad:
    """Counts tokens by layer and expert in every forward pass of a step.

    Scoring and recomputation passes count too, equally for all experts.

    Args:
        chunks: this rank's model chunks.
        spec: the model; for a dense model nothing is counted.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], spec: ModelSpec) -> None:
        self._counts: torch.Tensor | None = None
        if spec.experts is None:
            return
        device = next(chunks[0].parameters()).device
        shape = (spec.num_hidden_layers, spec.experts.count)
        self._counts = torch.zeros(shape, device=device, dtype=torch.float64)
        for module in (module for chunk in chunks for module in chunk.modules()):
            if isinstance(module, TopKRouter):
                module.register_forward_hook(self._count)

    def _count(self, router: Any, _, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        assert self._counts is not None
        self._counts[router.layer_number - 1] += output[1].sum(0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing inside: a canary's tokens are not part of a step."""
        before = None if self._counts is None else self._counts.clone()
        yield
        self._counts = before

    def pop(self) -> dict[str, float]:
        """Return ``moe/*`` since the last call, on every rank.

        One all-reduce of ``[layers, experts]`` over all ranks. Under tensor parallelism without
        sequence parallelism ranks count the same tokens, which does not change the shares.
        """
        if self._counts is None:
            return {}
        counts = self._counts.clone()
        self._counts.zero_()
        dist.all_reduce(counts)
        counts = counts[counts.sum(1) > 0]  # drops layers without experts
        if not len(counts):
            return {}
        share = counts / counts.mean(1, keepdim=True)
        return {
            "moe/load_max": float(share.amax(1).mean()),
            "moe/load_min": float(share.amin(1).mean()),
            "moe/idle_experts": float((counts == 0).double().mean()),
        }
