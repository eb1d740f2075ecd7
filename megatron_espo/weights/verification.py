"""Did the weights arrive, and does the engine compute with them? Pure comparisons; standard library only."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SHOWN = 5
# Mean |engine - trainer| log-prob difference that is taken for rounding, in nats a token. Measured on a 135M model:
# 1e-5 in float32, 0.03 in bfloat16; stale weights give 0.2 and more.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


def wrong_tensors(sent: Mapping[str, int], served: Mapping[str, int]) -> str | None:
    """What differs between the checksums of what the trainer sent and of what the engine serves; None: nothing.

    Tensors that one side does not know are not compared, except a tied output layer, which must be the embedding.
    """
    expected = dict(sent)
    if "lm_head.weight" not in sent and "model.embed_tokens.weight" in sent:
        expected["lm_head.weight"] = sent["model.embed_tokens.weight"]
    wrong = [name for name in expected if name in served and served[name] != expected[name]]
    if not wrong:
        return None
    more = f" (and {len(wrong) - _SHOWN} more)" if len(wrong) > _SHOWN else ""
    return f"{len(wrong)} of {len(expected)} tensors are not served as they were sent: {', '.join(wrong[:_SHOWN])}{more}"


@dataclass(frozen=True)
class CanarySample:
    """What the engine said after one prompt: token ids, their log-probs (nats), and which experts it chose (``Trajectory.routed_experts``)."""

    prompt_id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    routed_experts: Any = None

    @property
    def scored(self) -> tuple[tuple[int, ...], tuple[int, ...], Any]:
        """What the trainer is asked for the log-probs of."""
        return self.prompt_ids, self.response_ids, self.routed_experts

    @property
    def key(self) -> tuple:
        """Equal where :attr:`scored` is."""
        return self.prompt_ids, self.response_ids, None if self.routed_experts is None else self.routed_experts.tobytes()


def canary_gap(samples: Sequence[CanarySample], trained: Sequence[Sequence[float]]) -> tuple[float, str]:
    """Mean |engine - trainer| log-prob gap over all tokens (NaN if one is), and the worst token in words."""
    gaps = []
    for sample, row in zip(samples, trained, strict=True):
        for position, (token, ours, theirs) in enumerate(zip(sample.response_ids, sample.logprobs, row, strict=True)):
            text = f"prompt {sample.prompt_id!r}, token {position} (id {token}): engine {ours:.4f}, trainer {theirs:.4f}"
            gaps.append((abs(ours - theirs), text))
    worst = max(gaps, key=lambda gap: math.inf if math.isnan(gap[0]) else gap[0])
    return sum(gap for gap, _ in gaps) / len(gaps), worst[1]
