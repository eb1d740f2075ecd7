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
        experts = spec.experts.count if spec.experts else 0
        shape, device = (spec.num_hidden_layers, experts), torch.cuda.current_device()
        self._counts = torch.zeros(shape, device=device, dtype=torch.float64)
        for module in (module for chunk in chunks for module in chunk.modules()):
            if isinstance(module, TopKRouter):
                module.register_forward_hook(self._count)

    def _count(self, router: Any, _, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._counts[router.layer_number - 1] += output[1].sum(0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing inside: a canary's tokens are not part of a step."""
        before = self._counts.clone()
        yield
        self._counts = before

    def pop(self) -> dict[str, float]:
        """Return ``moe/*`` since the last call, on every rank.

        One all-reduce of ``[layers, experts]`` over all ranks. Under tensor parallelism without
        sequence parallelism ranks count the same tokens, which does not change the shares.
        """
        if not self._counts.numel():
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
