"""The frozen reference policy of a KL penalty."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class ReferencePolicy:
    """A copy of this rank's current weights in host memory (pinned with CUDA). Zero collectives.

    Args:
        chunks: this rank's model chunks.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._parameters = [p for chunk in chunks for p in chunk.parameters()]
        self._weights = [_to_host(parameter) for parameter in self._parameters]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the model the reference's weights; restore its own, bit for bit, on exit."""
        own = [_to_host(parameter) for parameter in self._parameters]
        try:
            self._fill(self._weights)
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, weights: Sequence[torch.Tensor]) -> None:
        # In place: Megatron's parameters are views of the distributed optimizer's buffers.
        for parameter, weight in zip(self._parameters, weights, strict=True):
            parameter.copy_(weight)


def _to_host(parameter: torch.Tensor) -> torch.Tensor:
    host = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=parameter.is_cuda)
    return host.copy_(parameter.detach())
