"""What a user of ESPO watches: sums per micro-batch, reduced to means once per step, written to TensorBoard and ``metrics.jsonl``."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_espo.types import Rollout

# Keys say how values combine: "sum/x" over "count/x" gives the mean x; "max/x" and "min/x" are themselves.


def loss_metrics(result, annotation, old_logprob: Tensor, rollout_logprob: Tensor, num_groups: int) -> dict[str, Tensor]:
    """Sums over the response tokens of one micro-batch, per entropy group, ready to be combined.

    Args:
        result: :class:`megatron_espo.algo.objectives.LossOutput`.
        annotation: :class:`megatron_espo.algo.Annotation` of the same tokens.
        old_logprob: ``[tokens]`` the trainer's old log-probs (nats).
        rollout_logprob: ``[tokens]`` the engine's, for the mismatch.
        num_groups: entropy groups of the configuration.

    Returns:
        Scalars (float32, this device). Zero collectives.
    """
    gap = (old_logprob - rollout_logprob).abs()
    metrics = {
        "sum/mismatch/logprob_gap_mean": gap.sum(),
        "count/mismatch/logprob_gap_mean": torch.ones_like(gap).sum(),
        "max/mismatch/logprob_gap_max": gap.max() if gap.numel() else gap.new_zeros(()),
        # E_rollout[log π_rollout - log π_train]: the plain estimate of KL(engine || trainer).
        "sum/mismatch/kl": (rollout_logprob - old_logprob).sum(),
        "count/mismatch/kl": torch.ones_like(gap).sum(),
        "sum/loss/policy": result.loss.detach(),
        "count/loss/policy": torch.zeros_like(gap).sum(),
    }
    per_token = {
        "entropy": annotation.entropy,
        "epsilon": annotation.high,
        "ratio": result.ratio,
        "clipped_low": result.clipped_low.float(),
        "clipped_high": result.clipped_high.float(),
        "no_gradient": result.no_gradient.float(),
    }
    for group in range(num_groups):
        member = annotation.group == group
        for name, values in per_token.items():
            metrics[f"sum/group{group}/{name}"] = values[member].sum()
            metrics[f"count/group{group}/{name}"] = member.sum().float()
        chosen = result.ratio[member]
        metrics[f"max/group{group}/ratio_max"] = chosen.max() if chosen.numel() else chosen.new_tensor(-torch.inf)
        metrics[f"min/group{group}/ratio_min"] = chosen.min() if chosen.numel() else chosen.new_tensor(torch.inf)
    return metrics


def reduce_metrics(micro_batches: list[dict[str, Tensor]], group) -> dict[str, float]:
    """Combine micro-batches and ranks into plain numbers.

    Args:
        micro_batches: the last pipeline stage's reports; empty on other stages, which return ``{}``.
        group: data-parallel group (with context parallelism) of that stage: three all-reduces over it.
    """
    if not micro_batches:
        return {}
    names = list(micro_batches[0])
    answer: dict[str, float] = {}
    operations = {"sum": dist.ReduceOp.SUM, "count": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
    combine = {"sum": torch.sum, "count": torch.sum, "max": torch.amax, "min": torch.amin}
    for kind, operation in operations.items():
        mine = [name for name in names if name.split("/", 1)[0] == kind]
        table = torch.stack([torch.stack([batch[name] for name in mine]) for batch in micro_batches])
        values = combine[kind](table, dim=0)
        dist.all_reduce(values, op=operation, group=group)
        answer |= dict(zip(mine, values.tolist(), strict=True))
    return _means(answer)


def _means(values: dict[str, float]) -> dict[str, float]:
    means = {}
    for key, value in values.items():
        kind, name = key.split("/", 1)
        if kind == "sum":
            count = values[f"count/{name}"]
            # A loss is already a mean over the batch: its weights say so.
            means[name] = value / count if count else (value if name.startswith("loss/") else 0.0)
        elif kind in ("max", "min"):
            means[name] = value if abs(value) != float("inf") else 0.0
    return means


def rollout_metrics(rollouts: list[list[Rollout]], rewards: Tensor, advantages: Tensor) -> dict[str, float]:
    """Reward and length figures of one rollout batch; ``rewards`` and ``advantages`` are ``[prompts, group_size]``, NaN = failed."""
    samples = [sample for group in rollouts for sample in group]
    lengths = torch.tensor([float(len(sample.response_ids)) for sample in samples])
    ran = rewards[~rewards.isnan()]
    highest, lowest = rewards.nan_to_num(-torch.inf).amax(1), rewards.nan_to_num(torch.inf).amin(1)
    spread = float(ran.std()) if ran.numel() > 1 else 0.0
    return {
        "reward/mean": float(ran.mean()),
        "reward/std": spread,
        "reward/standard_error": spread / max(1, ran.numel()) ** 0.5,
        "reward/equal_groups": float((highest <= lowest).float().mean()),
        "reward/failed": float(rewards.isnan().sum()),
        "rollout/with_advantage": float((advantages != 0).float().mean()),
        "rollout/length_mean": float(lengths.mean()),
        "rollout/length_max": float(lengths.max()),
        "rollout/truncated": sum(sample.truncated for sample in samples) / len(samples),
    }


def step_line(step: int, steps: int, metrics: dict[str, float]) -> str:
    """One line for the terminal."""
    phases = " ".join(f"{name[5:-2]} {metrics[name]:.1f}" for name in metrics if name.startswith("time/") and name != "time/step_s")
    return (
        f"step {step}/{steps}  reward {metrics['reward/mean']:.3f}  length {metrics['rollout/length_mean']:.1f}  "
        f"grad norm {metrics['optimizer/grad_norm']:.2f}  log-prob gap {metrics['mismatch/logprob_gap_mean']:.1e}  "
        f"{metrics['time/step_s']:.1f} s ({phases})"
    )


class MetricsWriter:
    """Writes a step's numbers to TensorBoard and, one JSON object a line, to ``metrics.jsonl``. Only rank 0 has one."""

    def __init__(self, folder: str | Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = Path(folder)
        self._board = SummaryWriter(str(self.folder / "tensorboard"))
        self._lines = open(self.folder / "metrics.jsonl", "w", encoding="utf-8")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write all of ``metrics`` at ``step`` (counted from 1) and flush."""
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        self._lines.write(json.dumps({"step": step, **metrics}) + "\n")
        self._lines.flush()
        self._board.flush()

    def text(self, name: str, value: str, step: int) -> None:
        """Write a text sample to TensorBoard."""
        self._board.add_text(name, value, step)

    def close(self) -> None:
        """Flush and close both files."""
        self._board.close()
        self._lines.close()


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
