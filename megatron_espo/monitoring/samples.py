"""Logged samples: a few responses of each step, token by token, in ``samples.jsonl`` and
TensorBoard.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

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
    reward: float | None,
    advantage: float,
    decode: Decode,
    entropies: tuple[list[float], list[int]] | None = None,
) -> dict[str, Any]:
    """One line of ``samples.jsonl``.

    ``mask`` is 1 for tokens that the policy sampled. ``policy_versions`` lists the versions that
    sampled. ``entropies`` (nats) and ``groups`` are ``None`` at other tokens, and altogether if the
    response was not trained.

    Args:
        step: counted from 1.
        rollout: the response.
        reward: ``None`` if the verifier failed.
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
        "reward": reward,
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
    """A sample for TensorBoard. Tokens of the highest entropy group are bold."""
    groups = record["groups"] or [None] * len(record["pieces"])
    highest = max((group for group in groups if group is not None), default=0)
    words = []
    for group, piece in zip(groups, record["pieces"], strict=True):
        # A line break would end the bold text. Indentation would start a code block.
        text = piece.replace("*", "\\*").replace("\n", "  \n")
        if highest and group == highest and (body := text.strip()):
            text = text.replace(body, f"**{body}**", 1)
        words.append(text)
    prompt = "".join(f"    {line}\n" for line in record["prompt"].splitlines())
    reward, advantage = record["reward"], record["advantage"]
    head = f"reward **{reward}**, advantage {advantage:.3g}, {len(record['tokens'])} tokens"
    return f"{head}, {record['finish_reason']}\n\n{prompt}\n{''.join(words)}"
