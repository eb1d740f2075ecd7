"""A run's outcome in one JSON file and one picture."""

import json
import math
from pathlib import Path
from statistics import mean

from megatron_espo.run_files import phase_names, read_jsonl


def write_summary(folder: str | Path, *, seconds: float, seed: int) -> dict[str, float]:
    """Write ``summary.json``: mean reward of the first and last three steps, steps, seconds of the whole run, seed."""
    rewards = [line["reward/mean"] for line in read_jsonl(Path(folder, "metrics.jsonl"))]
    summary = {
        "reward_first3": mean(rewards[:3]),
        "reward_last3": mean(rewards[-3:]),
        "steps": len(rewards),
        "seconds": round(seconds, 1),
        "seed": seed,
    }
    Path(folder, "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def draw_learning_curve(folder: str | Path, name: str | None = None) -> Path:
    """Draw reward, entropy by group and seconds by phase into ``learning_curve.png``; return its path.

    ``name`` heads the picture; the folder's name if ``None``.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display
    from matplotlib.ticker import MaxNLocator

    lines = read_jsonl(Path(folder, "metrics.jsonl"))
    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    figure.suptitle(name or Path(folder).name)
    reward, entropy, seconds = figure.subplots(1, 3)

    means = [line["reward/mean"] for line in lines]
    low = [line["reward/mean"] - line["reward/standard_error"] for line in lines]
    high = [line["reward/mean"] + line["reward/standard_error"] for line in lines]
    reward.fill_between(steps, low, high, alpha=0.2)
    reward.plot(steps, means, marker="o")
    # From 0, unless rewards are negative.
    reward.set(title="Reward (mean ± standard error)", xlabel="step", ylim=(None if min(low) < 0 else 0, None))

    groups = sorted({name.split("/")[0] for line in lines for name in line if name.startswith("group")})
    for group in groups:
        label = {groups[0]: "lowest", groups[-1]: "highest"}.get(group, group)
        entropy.plot(steps, [line.get(f"{group}/entropy", math.nan) for line in lines], label=f"{label}-entropy group")
    entropy.set(title="Entropy by group (nats)", xlabel="step", ylim=(0, None))
    if groups:
        entropy.legend()

    phases = phase_names(name for line in lines for name in line)
    seconds.stackplot(steps, *([line.get(f"time/{name}_s", 0.0) for line in lines] for name in phases), labels=phases)
    seconds.set(title="Seconds per step", xlabel="step", ylim=(0, None))
    seconds.legend(loc="upper right")
    for axes in (reward, entropy, seconds):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    path = Path(folder, "learning_curve.png")
    figure.savefig(path, dpi=120)
    return path
