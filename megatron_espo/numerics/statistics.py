"""Four numbers per token that give log-prob, entropy and their gradients. Zero collectives.

They are computed over a *part* of the vocabulary (a block of columns, a tensor-parallel shard):

    maximum  m = max logit of the part            (in logits, not divided by the temperature)
    sum_exp  a = Σ exp(s),     s = (logit - m)/T
    sum_s    b = Σ s·exp(s)
    target   y = the target's logit, -inf where the part does not have it

Parts merge like an online softmax. The maximum is subtracted *before* the division by the
temperature: around a logit of -1e4 the quotient alone has an error of 1e-3.
"""

import torch
from torch import Tensor

# exp(LOWEST) is 0 in float32 and float64; a finite floor keeps 0·(-inf) out of the sums.
LOWEST = -1000.0


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, but float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge(parts: Tensor, scale: float, dim: int) -> Tensor:
    """Merge ``parts [..., 4]`` along ``dim`` to ``[tokens, 4]``; ``scale`` is 1/temperature."""
    if parts.shape[dim] == 1:
        return parts.squeeze(dim)
    maximum, sum_exp, sum_s, target = parts.unbind(-1)
    top = maximum.amax(dim, keepdim=True)
    shift = ((maximum - top) * scale).clamp(min=LOWEST)
    weight = shift.exp()
    sum_s = (weight * (sum_s + shift * sum_exp)).sum(dim)
    sums = top.squeeze(dim), (weight * sum_exp).sum(dim), sum_s, target.amax(dim)
    return torch.stack(sums, dim=-1)


def logprob_and_entropy(sums: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``log π(y) = (y - m)/T - log a`` and ``H = log a - b/a``, both in nats."""
    m, a, b, y = sums.unbind(-1)
    log_a = a.log()
    return (y - m) * scale - log_a, log_a - b / a


def gradient_terms(
    sums: Tensor, scale: float, grad_logprob: Tensor | None, grad_entropy: Tensor | None
) -> Tensor:
    """Per-token numbers of the gradient, ``[tokens, 5]``: ``(m, b/a, u, v, target's gradient)``.

    The gradient of a logit with ``s = (logit - m)/T`` is ``exp(s)·(u + v·(s - b/a))``, plus
    ``grad_logprob/T`` in the target's column. That column is computed here in full precision: two
    roundings to bfloat16 would lose ``1 - p`` of a token with ``p`` near 1.
    """
    m, a, b, y = sums.unbind(-1)
    zero = torch.zeros_like(m)
    u = zero if grad_logprob is None else -scale * grad_logprob.to(m.dtype) / a
    v = zero if grad_entropy is None else -scale * grad_entropy.to(m.dtype) / a
    mean = b / a
    s = ((y - m) * scale).clamp(min=LOWEST)
    at_target = s.exp() * (u + v * (s - mean)) - u * a
    return torch.stack((m, mean, u, v, at_target), dim=1)
