"""How evenly the routers of a mixture of experts deal tokens out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter

from megatron_espo.config.experts import read_experts


class ExpertLoad:
    """Counts tokens by layer and expert in every forward pass of a step; scoring and recomputation count too, alike for all experts.

    Args:
        chunks: this rank's model chunks.
        hf_config: the model's ``config.json``; without experts nothing is counted.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], hf_config: dict[str, Any]) -> None:
        self._counts: torch.Tensor | None = None
        experts = read_experts(hf_config)
        if experts is None:
            return
        device = next(chunks[0].parameters()).device
        self._counts = torch.zeros(len(experts.layers), experts.count, device=device, dtype=torch.float64)
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    module.register_forward_hook(self._count)

    def _count(self, router: TopKRouter, _, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._counts[router.layer_number - 1] += output[1].sum(0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside nothing is counted: a canary's tokens are not a step's."""
        before = None if self._counts is None else self._counts.clone()
        yield
        self._counts = before

    def take(self) -> dict[str, float]:
        """``moe/*`` since the last call, on every rank. One all-reduce of ``[layers, experts]`` over all ranks, which hold other tokens or layers
        (or, under tensor parallelism without sequence parallelism, the same ones)."""
        if self._counts is None:
            return {}
        counts = self._counts.clone()
        self._counts.zero_()
        dist.all_reduce(counts)
        counts = counts[counts.sum(1) > 0]  # layers without experts; all of them, if nothing was trained
        if not len(counts):
            return {}
        share = counts / counts.mean(1, keepdim=True)
        return {
            "moe/load_max": float(share.amax(1).mean()),
            "moe/load_min": float(share.amin(1).mean()),
            "moe/idle_experts": float((counts == 0).double().mean()),
        }
