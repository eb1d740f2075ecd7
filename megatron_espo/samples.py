"""A few responses a step, token by token, in ``samples.jsonl``: what the report draws and a person reads."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from megatron_espo.types import Trajectory

Place = tuple[int, int]


def choose_samples(rewards: torch.Tensor, count: int) -> list[Place]:
    """``count`` places ``(prompt, sample)``: the best and the worst response of each prompt, prompts with differing rewards first.

    Args:
        rewards: ``[prompts, group_size]``, NaN where the verifier failed.
    """
    low, high = rewards.nan_to_num(torch.inf), rewards.nan_to_num(-torch.inf)
    best, worst = high.argmax(1).tolist(), low.argmin(1).tolist()
    varies = (high.amax(1) > low.amin(1)).tolist()
    places: list[Place] = []
    for prompt in sorted(range(len(rewards)), key=lambda prompt: not varies[prompt]):
        places += dict.fromkeys([(prompt, best[prompt]), (prompt, worst[prompt])])
    return places[:count]


def sample_record(step: int, rollout: Trajectory, reward: float, advantage: float, decode: Callable[[Sequence[int]], str]) -> dict[str, Any]:
    """One line of ``samples.jsonl`` but for ``entropies`` (nats) and ``groups``, one a token.

    ``mask`` is 1 where the policy sampled the token and 0 elsewhere. ``policy_versions`` lists the versions that sampled.
    """
    ids = rollout.response_ids.tolist()
    return {
        "step": step,
        "prompt_id": rollout.prompt.id,
        "prompt": rollout.prompt.text,
        "answer": rollout.prompt.answer,
        "response": rollout.text,
        "reward": reward,
        "advantage": advantage,
        "finish_reason": rollout.finish_reason,
        "policy_versions": np.unique(rollout.versions[rollout.loss_mask]).tolist(),
        "tokens": ids,
        "pieces": token_pieces(ids, decode),
        "mask": rollout.loss_mask.astype(int).tolist(),
    }


def spread(values: Sequence[Any], mask: Sequence[int]) -> list[Any]:
    """``values`` of the sampled tokens, with ``None`` at every other token."""
    left = iter(values)
    return [next(left) if sampled else None for sampled in mask]


def token_pieces(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text that each token adds; together they are the decoded text. Empty where the decoder shows none (special tokens).

    A character of several tokens belongs to the last of them: until it is whole, decoders write U+FFFD.
    """
    pieces, context, shown = [], 0, 0
    for end in range(1, len(ids) + 1):
        # Blanks depend on the token before, so a little context is decoded along.
        before, now = decode(ids[context:shown]), decode(ids[context:end])
        whole = end == len(ids) or not now.endswith("\N{REPLACEMENT CHARACTER}")
        pieces.append(now[len(before) :] if whole else "")
        if whole:
            context, shown = shown, end
    return pieces
