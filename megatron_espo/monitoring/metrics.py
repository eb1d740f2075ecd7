"""Metrics: sums over a micro-batch, means over a step."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_espo.algo import LossInputs, LossOutput, Objective, would_clip
from megatron_espo.types import Trajectory

# The key prefix selects the reduction: "sum/x" / "count/x" is the mean x; "total/x", "max/x" and
# "min/x" give x.
_COMBINE = (
    (("sum", "count", "total"), torch.sum, dist.ReduceOp.SUM),
    (("max",), torch.amax, dist.ReduceOp.MAX),
    (("min",), torch.amin, dist.ReduceOp.MIN),
)


def loss_metrics(
    objective: Objective,
    inputs: LossInputs,
    result: LossOutput,
    rollout_logprob: Tensor,
    per_token: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Sums over the response tokens of one micro-batch, over all tokens and for each entropy group.

    Args:
        objective: computed ``result`` from ``inputs``.
        inputs: of the loss.
        result: of the loss.
        rollout_logprob: ``[tokens]`` the engine's log-probs (nats).
        per_token: further values ``[tokens]`` to average.

    Returns:
        Scalars (float32, this device). One sum over context-parallel ranks.
    """
    segments = inputs.segments
    clipped_low, clipped_high = objective.clipped(inputs, result)
    gap = (inputs.old_logprob - rollout_logprob).abs()
    metrics = {
        "max/mismatch/logprob_gap_max": _max(gap),
        # The loss is already a weighted mean over the batch.
        "total/loss/policy": result.loss.detach(),
    }
    averaged = {
        "mismatch/logprob_gap_mean": gap,
        # E_rollout[log π_rollout - log π_train]: the plain estimate of KL(engine || trainer).
        "mismatch/kl": rollout_logprob - inputs.old_logprob,
        "policy/entropy": segments.entropy,
        "policy/clipped": (clipped_low | clipped_high).float(),
        "policy/no_gradient": result.no_gradient.float(),
        **{f"would_clip/{name}": clipped.float() for name, clipped in would_clip(inputs).items()},
        **per_token,
    }
    over_group = {
        "entropy": segments.entropy,
        "ratio": result.ratio,
        "clipped_low": clipped_low.float(),
        "clipped_high": clipped_high.float(),
        "no_gradient": result.no_gradient.float(),
    }
    clips = segments.high.isfinite()  # Without clipping there is no epsilon to report.
    for group in range(len(objective.quantiles) + 1):
        member = segments.group == group
        averaged |= {f"group{group}/{name}": values[member] for name, values in over_group.items()}
        averaged[f"group{group}/epsilon"] = segments.high[member & clips]
        chosen = result.ratio[member]
        metrics[f"max/group{group}/ratio_max"] = _max(chosen)
        metrics[f"min/group{group}/ratio_min"] = -_max(-chosen)
    for name, values in averaged.items():
        metrics[f"sum/{name}"] = values.sum()
        metrics[f"count/{name}"] = values.new_full((), values.numel())
    return metrics


def _max(values: Tensor) -> Tensor:
    return values.max() if values.numel() else values.new_tensor(-torch.inf)


def reduce_metrics_everywhere(micro_batches: list[dict[str, Tensor]], group) -> dict[str, float]:
    """Combine micro-batches and ranks. Three all-reduces over ``group`` on the last pipeline stage,
    then one broadcast over all ranks.

    Args:
        micro_batches: metrics of the last pipeline stage; empty on other stages.
        group: data-parallel group (with context parallelism) of that stage.

    Returns:
        Values by name on every rank, without metrics that have no token.
    """
    values: dict[str, float] = {}
    reductions = _COMBINE if micro_batches else ()
    for kinds, combine, operation in reductions:
        names = [name for name in micro_batches[0] if name.split("/", 1)[0] in kinds]
        # float64: float32 cannot count past 2^24 tokens.
        rows = [torch.stack([batch[name] for name in names]) for batch in micro_batches]
        combined = combine(torch.stack(rows).double(), dim=0)
        dist.all_reduce(combined, op=operation, group=group)
        values |= dict(zip(names, combined.tolist(), strict=True))
    means = {}
    for key, value in values.items():
        kind, name = key.split("/", 1)
        if kind == "sum" and values[f"count/{name}"]:
            means[name] = value / values[f"count/{name}"]
        # The maximum of no values is -inf. NaN stays visible.
        elif kind == "total" or (kind in ("max", "min") and not math.isinf(value)):
            means[name] = value
    box = [means]
    # Pipeline stages are the outermost dimension of Megatron's rank order: the last rank is on the
    # last stage.
    dist.broadcast_object_list(box, src=dist.get_world_size() - 1)
    return box[0]


def average_steps(results: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the optimizer steps that report it; maximum of ``*_max``, minimum of
    ``*_min``.
    """
    combine, names = {"_max": max, "_min": min}, {name: None for r in results for name in r}
    return {
        name: combine.get(name[-4:], fmean)([r[name] for r in results if name in r])
        for name in names
    }


def rollout_metrics(
    rollouts: list[list[Trajectory]], rewards: Tensor, advantages: Tensor
) -> dict[str, float]:
    """Reward and length metrics of one rollout batch.

    Args:
        rollouts: ``[prompt][sample]``.
        rewards: ``[prompts, group_size]``, NaN where the verifier failed.
        advantages: ``[prompts, group_size]``.

    Returns:
        ``reward/*``, ``rollout/*`` and ``environment/*``; see ``docs/metrics.md``.
    """
    samples = [sample for group in rollouts for sample in group]
    parts = [part for sample in samples for part in sample.parts]
    lengths = torch.tensor([float(sample.num_trained) for sample in samples])
    failed = rewards.isnan()
    ran, any_ran = rewards[~failed], ~failed.all(1)
    highest, lowest = rewards.nan_to_num(-torch.inf).amax(1), rewards.nan_to_num(torch.inf).amin(1)
    spread = float(ran.std()) if ran.numel() > 1 else 0.0
    metrics: dict[str, Any] = {
        "reward/mean": ran.mean(),
        "reward/std": spread,
        "reward/standard_error": spread / max(1, ran.numel()) ** 0.5,
        "reward/equal_groups": (highest <= lowest).float().mean(),
        "reward/solved_all": ((lowest >= 1) & any_ran).float().mean(),
        "reward/solved_none": ((highest <= 0) & any_ran).float().mean(),
        "reward/failed": failed.sum(),
        "rollout/with_advantage": (advantages != 0).float().mean(),
        "rollout/length_mean": lengths.mean(),
        "rollout/length_max": lengths.max(),
        "rollout/truncated": fmean(sample.truncated for sample in samples),
        "environment/failed": sum(sample.failed for sample in samples),
        "environment/turns": sum(len(part.turns) for part in parts) / len(samples),
        "environment/splits": len(parts) - len(samples),
    }
    sources = [group[0].prompt.source for group in rollouts]
    for name in sorted(set(sources) - {""}):
        of_source = torch.tensor([source == name for source in sources])
        if not failed[of_source].all():
            metrics[f"reward/{name}"] = rewards[of_source].nanmean()
        metrics[f"rollout/share_{name}"] = of_source.float().mean()
    for name in sorted({name for sample in samples for name in sample.rewards}):
        key = name if name.startswith("reward/") else f"environment/reward_{name}"
        metrics[key] = fmean(s.rewards[name] for s in samples if name in s.rewards)
    return {name: float(value) for name, value in metrics.items()}


def step_line(step: int, steps: int, metrics: dict[str, float]) -> str:
    """One line for the terminal."""
    seconds = {name[5:-2]: value for name, value in metrics.items() if name.startswith("time/")}
    total = seconds.pop("step")
    phases = " ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    gap = metrics.get("mismatch/logprob_gap_mean")
    gap_text = "none trained" if gap is None else f"{gap:.1e}"
    reward, length = metrics["reward/mean"], metrics["rollout/length_mean"]
    return (
        f"step {step}/{steps}  reward {reward:.3f}  length {length:.1f}  "
        f"grad norm {metrics['optimizer/grad_norm']:.2f}  log-prob gap {gap_text}  "
        f"{total:.1f} s ({phases})"
    )
