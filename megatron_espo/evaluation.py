"""avg@k and pass@k of judged responses, with bootstrap intervals over prompts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_espo.types import Trajectory

RESAMPLES = 5000
CONFIDENCE = 0.95  # level of the intervals


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of ``k`` responses is correct: ``1 - C(n - c, k) / C(n, k)`` (Chen et al., 2021).

    Args:
        n: responses.
        c: correct ones among them.
        k: at most ``n``.
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def bootstrap_interval(values: Sequence[float], confidence: float = CONFIDENCE, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values``, one a prompt: prompts are drawn anew with replacement, ``RESAMPLES`` times.

    A point where all values are equal: resampling knows nothing of what it has not seen.
    """
    column = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    # One resample after the other: all at once would be RESAMPLES x prompts numbers.
    means = [column[generator.integers(0, len(column), len(column))].mean() for _ in range(RESAMPLES)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class Evaluation:
    """Judged responses.

    Attributes:
        rollouts: ``[prompt][sample]``.
        rewards: ``[prompt][sample]``; ``None`` where the verifier failed, which counts as wrong.
    """

    rollouts: list[list[Trajectory]]
    rewards: list[list[float | None]]

    @property
    def samples(self) -> int:
        """Responses a prompt."""
        return len(self.rewards[0])

    @property
    def correct(self) -> list[int]:
        """Responses with a reward of at least 1, by prompt."""
        return [sum(reward is not None and reward >= 1 for reward in row) for row in self.rewards]

    def metrics(self) -> dict[str, float]:
        """``eval/avg@n``, ``eval/pass@k`` for the powers of two up to ``n`` and for ``n``, their intervals, and what else is worth watching."""
        n, found = self.samples, {}
        ks = sorted({2**i for i in range(n.bit_length())} | {n})
        columns = {f"avg@{n}": [c / n for c in self.correct]}
        columns |= {f"pass@{k}": [pass_at_k(n, c, k) for c in self.correct] for k in ks}
        for name, values in columns.items():
            low, high = bootstrap_interval(values)
            found |= {f"eval/{name}": float(np.mean(values)), f"eval/{name}_low": low, f"eval/{name}_high": high}
        judged = [reward for row in self.rewards for reward in row if reward is not None]
        responses = [sample for group in self.rollouts for sample in group]
        if judged:
            found["eval/reward_mean"] = float(np.mean(judged))
        return found | {
            "eval/length_mean": float(np.mean([sample.num_trained for sample in responses])),
            "eval/truncated": float(np.mean([sample.truncated for sample in responses])),
            "eval/failed": float(len(responses) - len(judged)),
        }

    def record(self, **head: Any) -> dict[str, Any]:
        """As JSON values: ``head``, the metrics, and for each prompt its rewards and response lengths."""
        prompts = [
            {"id": group[0].prompt.id, "rewards": row, "lengths": [sample.num_trained for sample in group]}
            for group, row in zip(self.rollouts, self.rewards, strict=True)
        ]
        return head | {"metrics": self.metrics(), "confidence": CONFIDENCE, "prompts": prompts}


def render_table(metrics: dict[str, float], prompts: int) -> str:
    """The metrics of one evaluation for a terminal."""
    lines = [f"{prompts} prompts, {CONFIDENCE:.0%} bootstrap intervals over prompts"]
    for name, value in metrics.items():
        if name.endswith(("_low", "_high")):
            continue
        interval = f"   {metrics[f'{name}_low']:.4f} – {metrics[f'{name}_high']:.4f}" if f"{name}_low" in metrics else ""
        lines.append(f"  {name.removeprefix('eval/'):<12} {value:>10.4f}{interval}")
    return "\n".join(lines)
