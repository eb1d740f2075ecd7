"""What a user of ESPO watches: sums per micro-batch, means per step, written to TensorBoard and ``metrics.jsonl``."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_espo.metric_names import board_layout
from megatron_espo.run_files import keep_steps
from megatron_espo.types import Trajectory

# Keys say how values combine: "sum/x" over "count/x" gives the mean x; "total/x", "max/x" and "min/x" are themselves.
_COMBINE = (
    (("sum", "count", "total"), torch.sum, dist.ReduceOp.SUM),
    (("max",), torch.amax, dist.ReduceOp.MAX),
    (("min",), torch.amin, dist.ReduceOp.MIN),
)


def loss_metrics(
    result,
    annotation,
    old_logprob: Tensor,
    rollout_logprob: Tensor,
    num_groups: int,
    per_token: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Sums over the response tokens of one micro-batch, in all and per entropy group, ready to be combined.

    Args:
        result: :class:`megatron_espo.algo.objectives.LossOutput`.
        annotation: :class:`megatron_espo.algo.Annotation` of the same tokens.
        old_logprob: ``[tokens]`` the trainer's old log-probs (nats).
        rollout_logprob: ``[tokens]`` the engine's, for the mismatch.
        num_groups: entropy groups of the configuration.
        per_token: further values ``[tokens]`` whose means are wanted.

    Returns:
        Scalars (float32, this device). Zero collectives.
    """
    gap = (old_logprob - rollout_logprob).abs()
    metrics = {
        "max/mismatch/logprob_gap_max": gap.max() if gap.numel() else gap.new_tensor(-torch.inf),
        # Its weights make it a mean over the batch already.
        "total/loss/policy": result.loss.detach(),
    }
    over_tokens = {
        "mismatch/logprob_gap_mean": gap,
        # E_rollout[log π_rollout - log π_train]: the plain estimate of KL(engine || trainer).
        "mismatch/kl": rollout_logprob - old_logprob,
        "policy/entropy": annotation.entropy,
        "policy/clipped": (result.clipped_low | result.clipped_high).float(),
        "policy/no_gradient": result.no_gradient.float(),
        **{f"would_clip/{name}": clipped.float() for name, clipped in result.would_clip.items()},
        **(per_token or {}),
    }
    for name, values in over_tokens.items():
        metrics[f"sum/{name}"] = values.sum()
        metrics[f"count/{name}"] = torch.ones_like(values).sum()
    over_group = {
        "entropy": annotation.entropy,
        "epsilon": annotation.high,
        "ratio": result.ratio,
        "clipped_low": result.clipped_low.float(),
        "clipped_high": result.clipped_high.float(),
        "no_gradient": result.no_gradient.float(),
    }
    for group in range(num_groups):
        member = annotation.group == group
        for name, values in over_group.items():
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
    values: dict[str, float] = {}
    for kinds, combine, operation in _COMBINE:
        names = [name for name in micro_batches[0] if name.split("/", 1)[0] in kinds]
        # float64: float32 cannot count past 2^24 tokens.
        table = torch.stack([torch.stack([batch[name] for name in names]) for batch in micro_batches]).double()
        combined = combine(table, dim=0)
        dist.all_reduce(combined, op=operation, group=group)
        values |= dict(zip(names, combined.tolist(), strict=True))
    return _means(values)


def reduce_metrics_everywhere(micro_batches: list[dict[str, Tensor]], group) -> dict[str, float]:
    """:func:`reduce_metrics`, then sent to the ranks of the other pipeline stages too: one broadcast over all ranks."""
    box = [reduce_metrics(micro_batches, group)]
    # Pipeline stages are the outermost dimension of Megatron's rank order: the last rank is on the last stage.
    dist.broadcast_object_list(box, src=dist.get_world_size() - 1)
    return box[0]


def _means(values: dict[str, float]) -> dict[str, float]:
    """Values by metric's name; none where no token was there to be measured."""
    means = {}
    for key, value in values.items():
        kind, name = key.split("/", 1)
        if kind == "sum" and values[f"count/{name}"]:
            means[name] = value / values[f"count/{name}"]
        # The maximum of nothing is -inf. NaN stays: it must be seen.
        elif kind == "total" or (kind in ("max", "min") and not math.isinf(value)):
            means[name] = value
    return means


def average_steps(results: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the optimizer steps that report it; of ``*_max`` and ``*_min`` the extreme."""
    values = {name: [result[name] for result in results if name in result] for result in results for name in result}
    extremes = {"_max": max, "_min": min}
    return {name: extremes.get(name[-4:], statistics.fmean)(found) for name, found in values.items()}


def rollout_metrics(rollouts: list[list[Trajectory]], rewards: Tensor, advantages: Tensor) -> dict[str, float]:
    """Reward and length figures of one rollout batch.

    Args:
        rollouts: ``[prompt][sample]``.
        rewards: ``[prompts, group_size]``, NaN where the verifier failed.
        advantages: ``[prompts, group_size]``.

    Returns:
        Among others ``reward/solved_all`` and ``reward/solved_none``, the shares of prompts whose rewards are all at
        least 1 or at most 0, ``reward/equal_groups``, the share whose rewards do not differ, and ``reward/failed``, the
        number of NaNs.
    """
    samples = [sample for group in rollouts for sample in group]
    lengths = torch.tensor([float(sample.num_trained) for sample in samples])
    ran = rewards[~rewards.isnan()]
    highest, lowest = rewards.nan_to_num(-torch.inf).amax(1), rewards.nan_to_num(torch.inf).amin(1)
    any_ran = ~rewards.isnan().all(1)
    spread = float(ran.std()) if ran.numel() > 1 else 0.0
    return {
        "reward/mean": float(ran.mean()),
        "reward/std": spread,
        "reward/standard_error": spread / max(1, ran.numel()) ** 0.5,
        "reward/equal_groups": float((highest <= lowest).float().mean()),
        "reward/solved_all": float(((lowest >= 1) & any_ran).float().mean()),
        "reward/solved_none": float(((highest <= 0) & any_ran).float().mean()),
        "reward/failed": float(rewards.isnan().sum()),
        "rollout/with_advantage": float((advantages != 0).float().mean()),
        "rollout/length_mean": float(lengths.mean()),
        "rollout/length_max": float(lengths.max()),
        "rollout/truncated": sum(sample.truncated for sample in samples) / len(samples),
        "environment/failed": float(sum(sample.failed for sample in samples)),
        "environment/turns": sum(len(part.turns) for sample in samples for part in sample.parts) / len(samples),
        "environment/splits": float(sum(len(sample.earlier) for sample in samples)),
    } | _reward_parts(samples)


def _reward_parts(samples: list[Trajectory]) -> dict[str, float]:
    """Mean of each named part of the reward, over the samples that have it."""
    names = sorted({name for sample in samples for name in sample.rewards})
    values = {name: [sample.rewards[name] for sample in samples if name in sample.rewards] for name in names}
    return {f"environment/reward_{name}": sum(found) / len(found) for name, found in values.items()}


def step_line(step: int, steps: int, metrics: dict[str, float]) -> str:
    """One line for the terminal."""
    seconds = {name[5:-2]: value for name, value in metrics.items() if name.startswith("time/")}
    total = seconds.pop("step")
    phases = " ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    gap = metrics.get("mismatch/logprob_gap_mean")
    gap_text = "none trained" if gap is None else f"{gap:.1e}"
    return (
        f"step {step}/{steps}  reward {metrics['reward/mean']:.3f}  length {metrics['rollout/length_mean']:.1f}  "
        f"grad norm {metrics['optimizer/grad_norm']:.2f}  log-prob gap {gap_text}  "
        f"{total:.1f} s ({phases})"
    )


class MetricsWriter:
    """Writes a step's numbers to TensorBoard and, one JSON object a line, to ``metrics.jsonl``. Only rank 0 has one.

    Args:
        folder: the run's.
        wandb: a run of Weights & Biases that gets the same numbers, or ``None``.
        after_step: the last step of an earlier part of the run that is kept; what was written of later ones is taken back.
    """

    def __init__(self, folder: str | Path, wandb: Any = None, after_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = Path(folder)
        # Steps of a part of the run that was lost are trained again: they must not stand there twice.
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=after_step + 1)
        self._board.add_custom_scalars(board_layout())
        path = self.folder / "metrics.jsonl"
        keep_steps(path, after_step)
        self._lines = path.open("a", encoding="utf-8")
        self._wandb = wandb

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write all of ``metrics`` at ``step`` (counted from 1) and flush."""
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        self._lines.write(json.dumps({"step": step, **metrics}) + "\n")
        self._lines.flush()
        self._board.flush()
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def text(self, name: str, value: str, step: int) -> None:
        """Write a text sample to TensorBoard."""
        self._board.add_text(name, value, step)

    def histogram(self, name: str, counts: list[int], edges: list[float], step: int) -> None:
        """Write a histogram of counted values to TensorBoard; ``edges`` has one more item than ``counts``."""
        total = sum(counts)
        if not total:
            return
        middles = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]
        occupied = [i for i, count in enumerate(counts) if count]
        self._board.add_histogram_raw(
            name,
            min=edges[occupied[0]],
            max=edges[occupied[-1] + 1],
            num=total,
            sum=sum(count * middle for count, middle in zip(counts, middles, strict=True)),
            sum_squares=sum(count * middle**2 for count, middle in zip(counts, middles, strict=True)),
            bucket_limits=edges[1:],
            bucket_counts=counts,
            global_step=step,
        )

    def close(self) -> None:
        """Flush and close both files; end the run of Weights & Biases."""
        self._board.close()
        self._lines.close()
        if self._wandb is not None:
            self._wandb.finish()
