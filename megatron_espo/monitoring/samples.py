"""Logged samples: a few responses of each step, token by token, in ``samples.jsonl`` and
TensorBoard.
"""

import math
from collections.abc import Callable, Sequence
from textwrap import indent
from typing import Any

import numpy as np
import torch

from megatron_espo.monitoring.entropy import TokenEntropies
from megatron_espo.types import Trajectory

SampleIndex = tuple[int, int]
Decode = Callable[[Sequence[int]], str]


def choose_samples(rewards: torch.Tensor, count: int) -> list[SampleIndex]:
    """Choose ``count`` samples ``(prompt, sample)``: the best and the worst of each prompt, prompts
    with differing rewards first.

    Args:
        rewards: ``[prompts, group_size]``, NaN where the verifier failed.
        count: number of samples.
    """
    low, high = rewards.nan_to_num(torch.inf), rewards.nan_to_num(-torch.inf)
    best, worst = high.argmax(1).tolist(), low.argmin(1).tolist()
    varies = (high.amax(1) > low.amin(1)).tolist()
    indices: list[SampleIndex] = []
    for prompt in sorted(range(len(rewards)), key=lambda prompt: not varies[prompt]):
        indices += dict.fromkeys([(prompt, best[prompt]), (prompt, worst[prompt])])
    return indices[:count]


def sample_record(
    step: int,
    rollout: Trajectory,
    reward: float,
    advantage: float,
    decode: Decode,
    entropies: TokenEntropies | None = None,
) -> dict[str, Any]:
    """One line of ``samples.jsonl``.

    ``mask`` is 1 for tokens that the policy sampled. ``policy_versions`` lists the versions that
    sampled. ``entropies`` (nats) and ``groups`` are ``None`` at other tokens, and altogether if the
    response was not trained.

    Args:
        step: counted from 1.
        rollout: the response.
        reward: NaN if the verifier failed.
        advantage: of the response.
        decode: text of token ids.
        entropies: entropies and entropy groups of the sampled tokens; ``None`` if the response was
            not trained.
    """
    ids, mask = rollout.response_ids.tolist(), rollout.loss_mask.tolist()
    record = {
        "step": step,
        "prompt_id": rollout.prompt.id,
        "prompt": rollout.prompt.text,
        "answer": rollout.prompt.answer,
        "response": rollout.text,
        "reward": None if math.isnan(reward) else reward,
        "advantage": advantage,
        "finish_reason": rollout.finish_reason,
        "policy_versions": np.unique(rollout.versions[rollout.loss_mask]).tolist(),
        "tokens": ids,
        "pieces": token_pieces(ids, decode),
        "mask": [int(sampled) for sampled in mask],
        "entropies": None,
        "groups": None,
    }
    if entropies is not None:
        values, groups = iter(entropies[0]), iter(entropies[1])
        record["entropies"] = [round(next(values), 4) if sampled else None for sampled in mask]
        record["groups"] = [next(groups) if sampled else None for sampled in mask]
    return record


def token_pieces(ids: Sequence[int], decode: Decode) -> list[str]:
    """The text that each token adds; the concatenation is the decoded text. Empty for special
    tokens that ``decode`` omits.

    If a character has several tokens, the last one gets it: until then decoders return U+FFFD.
    """
    pieces, context, shown = [], 0, 0
    for end in range(1, len(ids) + 1):
        # Spaces depend on the previous token, so the previous piece is decoded too.
        before, now = decode(ids[context:shown]), decode(ids[context:end])
        complete = end == len(ids) or not now.endswith("\N{REPLACEMENT CHARACTER}")
        pieces.append(now[len(before) :] if complete else "")
        if complete:
            context, shown = shown, end
    return pieces


def as_markdown(record: dict[str, Any]) -> str:
    """A sample for TensorBoard: the text is indented, which makes it a code block."""
    reward, advantage, tokens = record["reward"], record["advantage"], len(record["tokens"])
    head = f"reward **{reward}**, advantage {advantage:.3g}, {tokens} tokens"
    prompt, response = (indent(record[name], "    ") for name in ("prompt", "response"))
    return f"{head}, {record['finish_reason']}\n\n{prompt}\n\n---\n\n{response}"
