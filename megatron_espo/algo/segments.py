"""Segments of responses, their clip bounds and token weights (Eq. 7 and 8).

Per-token tensors hold all responses one after the other; ``lengths [responses]`` says where each
ends.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

SumOverRanks = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Segments:
    """Which segment, response and entropy group each token belongs to.

    Attributes:
        segment: ``[tokens]`` int64, number of the token's segment, counted over all responses.
        size: ``[segments]`` int64, tokens in each segment (``n_σ``).
        response: ``[tokens]`` int64, number of the token's response.
        length: ``[responses]`` int64, tokens in each response (``T_i``).
        group: ``[tokens]`` int64, entropy group, 0 the lowest. ESPO's segments; other objectives
            only report it.
        entropy: ``[tokens]`` float32, entropy of the old policy (nats).
    """

    segment: Tensor
    size: Tensor
    response: Tensor
    length: Tensor
    group: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class TokenSegments(Segments):
    """Everything about the tokens that does not depend on the trained policy.

    An objective computes it on whole responses, before micro-batches, packing and context
    parallelism.

    Attributes:
        low, high: ``[tokens]`` float32, clip range: the ratio is clipped to ``[1 - low, 1 + high]``
            (GMPO: the log-ratio to ``[-low, high]``); infinite for an objective that does not clip.
        weight: ``[tokens]`` float32, factor of the token's surrogate in the optimizer step's loss.
    """

    low: Tensor
    high: Tensor
    weight: Tensor

    def select(self, tokens: Tensor) -> "TokenSegments":
        """Keep the tokens at the indices ``tokens [some]`` int64; ``size`` and ``length`` stay."""
        whole = ("size", "length")
        return replace(self, **{n: v[tokens] for n, v in vars(self).items() if n not in whole})


def entropy_groups(
    entropy: Tensor, lengths: Tensor, quantiles: tuple[float, ...] = (0.8,)
) -> Tensor:
    """Group each response's tokens by the rank of their entropy (Eq. 7).

    For a quantile ``q``, the ``ceil((1 - q) T)`` tokens of highest entropy lie above the boundary.
    Of tied tokens the earlier one joins the higher group.

    Args:
        entropy: ``[tokens]``, entropy of the old policy (nats).
        lengths: ``[responses]`` int64, tokens of each response; their sum is ``tokens``.
        quantiles: inside (0, 1).

    Returns:
        ``[tokens]`` int64, 0 (lowest entropy) to ``len(quantiles)``.

    Raises:
        ValueError: lengths whose sum is not the number of tokens.
    """
    integers = lengths.dim() == 1 and not lengths.is_floating_point()
    if not integers or (lengths < 1).any() or entropy.shape != (int(lengths.sum()),):
        raise ValueError(
            "lengths: expected integers [responses] of at least 1 whose sum is the number of "
            f"tokens of entropy {list(entropy.shape)}, got {lengths.tolist()[:8]} with sum "
            f"{lengths.sum().item()}"
        )
    response = response_index(lengths)
    # Two stable sorts order by response, then by descending entropy, then by position.
    order = torch.sort(entropy, descending=True, stable=True).indices
    order = order[torch.sort(response[order], stable=True).indices]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device)
    rank -= (lengths.cumsum(0) - lengths)[response]
    group = torch.zeros_like(rank)
    for quantile in quantiles:
        group += rank < tokens_above(quantile, lengths)[response]
    return group


def tokens_above(quantile: float, lengths: Tensor) -> Tensor:
    """``ceil((1 - quantile) T)`` of each length ``T``, in exact arithmetic.

    In floating point ``0.7 T`` is off by one for 1,638 of the lengths up to 16,384. Python integers
    also hold the numerators of a quantile with sixteen digits (1/3), which overflow int64.
    """
    share = 1 - Fraction(str(quantile))
    return lengths.new_tensor([math.ceil(share * length) for length in lengths.tolist()])


def response_index(lengths: Tensor) -> Tensor:
    """Number of each token's response, ``[tokens]`` int64."""
    return torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)


def sum_by_index(values: Tensor, index: Tensor, count: int) -> Tensor:
    """Sums ``[count]`` of ``values [tokens]`` with the same ``index [tokens]``."""
    return values.new_zeros(count).index_add_(0, index, values)


def as_float(name: str, values: Tensor, like: Tensor) -> Tensor:
    """``values`` as float32, the least precision in which sums over tokens are exact enough.

    float64 stays float64.

    Raises:
        ValueError: a shape or device other than that of ``like``.
    """
    if (values.shape, values.device) != (like.shape, like.device):
        raise ValueError(
            f"{name}: expected shape {list(like.shape)} on {like.device}, "
            f"got {list(values.shape)} on {values.device}"
        )
    return values.to(torch.promote_types(values.dtype, torch.float32))


def check_range(name: str, values: Tensor, low: float, high: float, expected: str) -> None:
    """Raise ValueError if one of ``values [tokens]`` is not finite or lies outside ``[low, high]``.

    Synchronizes a GPU.
    """
    wrong = ~values.isfinite() | (values < low) | (values > high)
    if wrong.any():
        position = int(wrong.nonzero()[0])
        got = f"got {values[position].item()} at token {position}"
        raise ValueError(f"{name}: expected {expected}, {got}")
