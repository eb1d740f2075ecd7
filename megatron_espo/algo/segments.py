"""Entropy groups, clip bounds and token weights: everything that is fixed before the policy moves (Eq. 7 and 8).

Responses are ragged: per-token tensors hold all responses one after the other, ``lengths [responses]`` says where they
end.
"""

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from megatron_espo.algo.objectives import OBJECTIVES


@dataclass(frozen=True)
class Annotation:
    """What an objective fixes per token on whole responses, before micro-batches, packing or context-parallel slices.

    Attributes:
        segment: ``[tokens]`` int64, number of the token's segment, counted over all responses of the annotation.
        size: ``[segments]`` int64, tokens in each segment (``n_σ``).
        response: ``[tokens]`` int64, number of the token's response.
        length: ``[responses]`` int64, tokens in each response (``T_i``).
        low, high: ``[tokens]`` float32, the ratio is clipped to ``[1 - low, 1 + high]`` (GMPO: the log-ratio to
            ``[-low, high]``).
        weight: ``[tokens]`` float32, the token's share of the optimizer step's loss.
        group: ``[tokens]`` int64, entropy group, 0 the lowest. ESPO's segments; for other objectives only reported.
        entropy: ``[tokens]`` float32, entropy of the old policy in nats.
    """

    segment: Tensor
    size: Tensor
    response: Tensor
    length: Tensor
    low: Tensor
    high: Tensor
    weight: Tensor
    group: Tensor
    entropy: Tensor

    def take(self, tokens: Tensor) -> "Annotation":
        """The same for some of the tokens, ``tokens [some]`` int64; segments and responses stay whole."""
        per_token = ("segment", "response", "low", "high", "weight", "group", "entropy")
        return replace(self, **{name: getattr(self, name)[tokens] for name in per_token})


def entropy_groups(entropy: Tensor, lengths: Tensor, quantiles: tuple[float, ...] = (0.8,)) -> Tensor:
    """Group each response's tokens by the rank of their entropy (Eq. 7).

    For a quantile ``q`` the ``ceil((1 - q) T)`` tokens of highest entropy lie above the border; of tied tokens the
    earlier one joins the higher group.

    Args:
        entropy: ``[tokens]``, nats, of the old policy.
        lengths: ``[responses]`` int64, tokens of each response; they sum to ``tokens``.
        quantiles: sorted, inside (0, 1).

    Returns:
        ``[tokens]`` int64, 0 (lowest entropy) to ``len(quantiles)``.
    """
    response, offset = _response_index(lengths)
    # Two stable sorts = by response, then by descending entropy, then by position.
    order = torch.sort(entropy, descending=True, stable=True).indices
    order = order[torch.sort(response[order], stable=True).indices]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device)
    rank = rank - offset[response]
    group = torch.zeros_like(rank)
    for quantile in quantiles:
        group += rank < _tokens_above(quantile, lengths)[response]
    return group


def annotate(
    entropy: Tensor,
    lengths: Tensor,
    algorithm,
    *,
    vocab_size: int,
    num_responses: int,
    num_tokens: int,
    max_response_tokens: int | None,
) -> Annotation:
    """Cut responses into the objective's segments and fix bounds and weights (Eq. 7, 8). Zero collectives.

    May be called on any subset of whole responses: the weights refer to the optimizer step's whole batch.

    Args:
        entropy: ``[tokens]`` float32, entropy of the old policy over the true vocabulary, nats.
        lengths: ``[responses]`` int64, all at least 1.
        algorithm: the ``algorithm`` section of the configuration (``objective``, ``alpha``, ``quantiles``, ...).
        vocab_size: the true vocabulary, whose logarithm is the largest possible entropy.
        num_responses: ``N`` of the step's whole batch, masked responses included.
        num_tokens: response tokens ``Σ T`` of the step's whole batch.
        max_response_tokens: the generation limit (Dr. GRPO's constant; no other objective needs it).

    Raises:
        ValueError: entropies outside ``[0, ln V]``, lengths that do not cover them, or Dr. GRPO without its constant.
    """
    _check(entropy, lengths, vocab_size)
    objective = OBJECTIVES[algorithm.objective]
    response, _ = _response_index(lengths)
    group = entropy_groups(entropy, lengths, tuple(algorithm.quantiles))
    keys = {"entropy": response * (len(algorithm.quantiles) + 1) + group, "response": response}
    key = keys.get(objective.segments, torch.arange(entropy.numel(), device=entropy.device))
    _, segment, size = torch.unique(key, return_inverse=True, return_counts=True)

    if objective.segments == "entropy":
        mean_entropy = entropy.new_zeros(size.numel()).index_add_(0, segment, entropy) / size
        low = high = (algorithm.alpha / math.log(vocab_size) * mean_entropy).clamp(min=algorithm.clip_floor)[segment]
    else:
        low = torch.full_like(entropy, objective.low if algorithm.clip_low is None else algorithm.clip_low)
        high = torch.full_like(entropy, objective.high if algorithm.clip_high is None else algorithm.clip_high)

    if objective.weights == "segment":
        first = torch.zeros_like(size).index_put_((segment,), response)
        segments_of = torch.bincount(first, minlength=lengths.numel())
        count = num_responses * segments_of[response] * size[segment]
    elif objective.weights == "response":
        count = num_responses * lengths[response]
    elif objective.weights == "token":
        count = torch.full_like(response, num_tokens)
    elif max_response_tokens:
        count = torch.full_like(response, num_responses * max_response_tokens)
    else:
        raise ValueError(f"max_response_tokens: {algorithm.objective} divides by it: expected 1 or more, got none")
    return Annotation(segment, size, response, lengths, low, high, count.to(entropy).reciprocal(), group, entropy)


def _response_index(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Response number of each token ``[tokens]`` and first token of each response ``[responses]``."""
    response = torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)
    return response, lengths.cumsum(0) - lengths


def _tokens_above(quantile: float, lengths: Tensor) -> Tensor:
    """``ceil((1 - quantile) T)`` exactly: in floats ``0.7 T`` is off by one for 1,638 lengths up to 16,384."""
    share = 1 - Fraction(str(quantile))
    # Python's integers: a quantile with sixteen digits (1/3) would overflow int64.
    return lengths.new_tensor([math.ceil(share * length) for length in lengths.tolist()])


def _check(entropy: Tensor, lengths: Tensor, vocab_size: int) -> None:
    if entropy.dim() != 1 or int(lengths.sum()) != entropy.numel() or (lengths < 1).any():
        raise ValueError(
            f"lengths: expected lengths of at least 1 whose sum is the {entropy.numel()} tokens of entropy, "
            f"got {lengths.numel()} lengths with sum {int(lengths.sum())}"
            + (f" and minimum {int(lengths.min())}" if lengths.numel() else "")
        )
    limit = math.log(vocab_size) + 1e-3
    # Written so that NaN fails too.
    wrong = ~((entropy >= -1e-3) & (entropy <= limit))
    if wrong.any():
        position = int(wrong.nonzero()[0])
        raise ValueError(
            f"entropy: expected values in [0, ln {vocab_size} = {math.log(vocab_size):.4f}] nats, "
            f"got {float(entropy[position])} at token {position}: "
            "was it computed over the true vocabulary, at the sampling temperature?"
        )
