"""Group-relative advantages (Eq. 11), RL-ZVP, and the penalty for long responses."""

from typing import Literal, get_args

import torch
from torch import Tensor

AdvantageName = Literal["grpo", "dr_grpo", "rloo", "maxrl"]


def group_advantages(rewards: Tensor, method: AdvantageName = "grpo") -> Tensor:
    """Advantages over the ``n`` responses of each prompt whose verifier ran.

    ``grpo``: ``(R - mean) / std`` (Eq. 11), with the unbiased standard deviation. ``dr_grpo``:
    ``R - mean``. ``rloo``: the reward minus the mean of the other responses, which is
    ``(R - mean) n / (n - 1)``. ``maxrl``: ``(R - mean) / mean`` (arXiv 2602.02710).

    Args:
        rewards: ``[prompts, group_size]``; NaN where the verifier failed. Such a response gets
            ``A = 0`` and does not count in ``n``, mean and standard deviation.
        method: one of the four names above.

    Returns:
        ``[prompts, group_size]`` float32. Exactly 0 for a group whose rewards are all equal.

    Raises:
        ValueError: a group of one response, an infinite reward, a negative one with ``maxrl``, or
            an unknown method.
    """
    rewards = torch.as_tensor(rewards)
    if rewards.dim() != 2 or rewards.size(1) < 2:
        raise ValueError(f"rewards: expected [prompts, group_size >= 2], got {list(rewards.shape)}")
    if rewards.isinf().any():
        raise ValueError("rewards: expected finite values, NaN where the verifier failed; got inf")
    rewards = rewards.double()
    ran = ~rewards.isnan()
    filled = rewards.where(ran, 0.0)
    count = ran.sum(1, keepdim=True)
    centred = (filled - filled.sum(1, keepdim=True) / count.clamp(min=1)).where(ran, 0.0)
    # Compare maximum and minimum: the floating-point std of eight equal 100.1s is 1.6e-5, not 0.
    highest = rewards.where(ran, -torch.inf).amax(1, keepdim=True)
    varies = highest > rewards.where(ran, torch.inf).amin(1, keepdim=True)
    if method == "grpo":
        scale = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    elif method == "dr_grpo":
        scale = torch.ones_like(highest)
    elif method == "rloo":
        scale = (count - 1) / count.clamp(min=1)
    elif method == "maxrl":
        if (filled < 0).any():
            raise ValueError(f"rewards: expected at least 0 for maxrl, got {filled.min()}")
        scale = filled.sum(1, keepdim=True) / count.clamp(min=1)
    else:
        raise ValueError(f"method: expected one of {get_args(AdvantageName)}, got {method!r}")
    return (centred / scale.where(varies, 1.0)).where(varies, 0.0).float()


def zero_variance_signs(rewards: Tensor) -> Tensor:
    """Which prompts RL-ZVP trains: their rewards are all equal, and all right or all wrong.

    Args:
        rewards: ``[prompts, group_size]``; NaN where the verifier failed.

    Returns:
        The same shape, float32: 1 where every reward of the prompt is the same number of at least
        1, -1 where it is the same number of at most 0, otherwise 0; 0 where the verifier failed.
    """
    ran = ~rewards.isnan()
    highest = rewards.where(ran, -torch.inf).amax(1, keepdim=True)
    equal = ran & (highest == rewards.where(ran, torch.inf).amin(1, keepdim=True))
    return (equal & (highest >= 1)).float() - (equal & (highest <= 0)).float()


def entropy_shape(entropy: Tensor, response: Tensor, signs: Tensor) -> Tensor:
    """Factor of each token's advantage under RL-ZVP (arXiv 2509.21880).

    ``H_t`` where the rewards are all right, ``max_u H_u - H_t`` over the response where they are
    all wrong: the tokens at which the policy decides are rewarded most and penalized least.

    Args:
        entropy: ``[tokens]`` float32, entropy of the old policy (nats).
        response: ``[tokens]`` int64, number of the token's response; the responses are whole.
        signs: ``[responses]``, from :func:`zero_variance_signs`.

    Returns:
        ``[tokens]``, at least 0; 1 where the sign is 0.
    """
    highest = entropy.new_zeros(len(signs)).scatter_reduce_(0, response, entropy, "amax")
    sign = signs[response]
    shape = entropy.where(sign > 0, highest[response] - entropy)
    return shape.where(sign != 0, 1.0)


def overlong_penalty(lengths: Tensor, *, max_tokens: int, buffer_tokens: int) -> Tensor:
    """DAPO's soft overlong penalty: from 0 at ``max_tokens - buffer_tokens`` to -1.

    Args:
        lengths: response tokens, any shape.
        max_tokens: the generation limit; longer responses get -1.
        buffer_tokens: 1 to ``max_tokens``.

    Returns:
        The same shape, float32, to be added to the rewards.
    """
    beyond = (lengths - (max_tokens - buffer_tokens)).clamp(0, buffer_tokens)
    return -beyond.float() / buffer_tokens
