"""The frozen reference policy of a KL penalty: the initial weights, kept on the host and lent to the model for a scoring pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class ReferencePolicy:
    """A copy of this rank's weights as they are now, in host memory (pinned where there is CUDA). Zero collectives.

    Args:
        chunks: this rank's model chunks.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._chunks = chunks
        self._weights = [_to_host(parameter) for chunk in chunks for parameter in chunk.parameters()]

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Inside, the model has the reference's weights; afterwards its own again, bit for bit."""
        parameters = [parameter for chunk in self._chunks for parameter in chunk.parameters()]
        own = [_to_host(parameter) for parameter in parameters]
        try:
            _fill(parameters, self._weights)
            yield
        finally:
            _fill(parameters, own)


def _to_host(parameter: torch.Tensor) -> torch.Tensor:
    host = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=parameter.is_cuda)
    return host.copy_(parameter.detach())


@torch.no_grad()
def _fill(parameters: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> None:
    # In place: Megatron's parameters are views of the distributed optimizer's buffers.
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.copy_(weight)
