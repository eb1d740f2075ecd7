"""The frozen reference policy of a KL penalty."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_espo.megatron.offload import host_memory


class ReferencePolicy:
    """A copy of this rank's current weights in host memory (pinned with CUDA). Zero collectives.

    Args:
        chunks: this rank's model chunks.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        parameters = [p for chunk in chunks for p in chunk.parameters()]
        # The widest dtype first, so that each copy is aligned.
        self._parameters = sorted(parameters, key=lambda p: -p.itemsize)
        sizes = [p.nbytes for p in self._parameters]
        places = host_memory(sum(sizes)).split(sizes)
        pairs = zip(self._parameters, places, strict=True)
        self._weights = [place.view(p.dtype).view(p.shape).copy_(p.detach()) for p, place in pairs]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the model the reference's weights; restore its own, bit for bit, on exit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # In place: Megatron's parameters are views of the distributed optimizer's buffers.
        for parameter, weight in zip(self._parameters, self._weights, strict=True):
            own = parameter.clone()
            parameter.copy_(weight)
            weight.copy_(own)
