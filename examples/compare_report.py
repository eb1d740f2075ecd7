"""Writes the tables, pictures and page of ``compare_objectives.py``."""

import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

from megatron_espo.files import read_jsonl

BEGIN = "<!-- results: written by examples/compare_objectives.py -->"
END = "<!-- end of results -->"
EVERY = 20  # steps from one evaluation to the next, and of one mean
GOAL = 0.8  # accuracy of the column "steps to"
COLUMNS: dict[str, Callable[[dict[str, float]], float]] = {
    "accuracy": lambda line: line.get("eval/avg@1", math.nan),
    "reward": lambda line: line["reward/mean"],
    "entropy": lambda line: line.get("policy/entropy", math.nan),
    "clipped": lambda line: line.get("policy/clipped", math.nan),
    "with_gradient": lambda line: 1 - line.get("policy/no_gradient", math.nan),
}
PANELS = {
    "accuracy": "Accuracy on test prompts",
    "entropy": "Entropy of trained tokens (nats)",
    "clipped": "Share outside the clip range",
    "with_gradient": "Share with a gradient",
}


@dataclass(frozen=True)
class Run:
    """A finished run: means over :data:`EVERY` steps of each of :data:`COLUMNS`."""

    phase: str
    variant: str
    rate: float
    seed: int
    curves: dict[str, list[float]]

    def last(self, name: str, steps: int | None = None) -> float:
        """Return the mean of the :data:`EVERY` steps up to ``steps`` (the end)."""
        return self.curves[name][(steps // EVERY if steps else 0) - 1]

    def mean(self, name: str, steps: int | None = None) -> float:
        """Return the mean over the first ``steps`` (all)."""
        return nanmean(self.curves[name][: steps // EVERY if steps else None])

    def steps_to_goal(self) -> float:
        """Return the step of the first evaluation with an accuracy of :data:`GOAL`."""
        reached = (i for i, a in enumerate(self.curves["accuracy"], 1) if a >= GOAL)
        return next(reached, math.inf) * EVERY

    def collapsed(self) -> bool:
        """Whether the accuracy ends below half of its highest value."""
        return self.last("accuracy") < max(self.curves["accuracy"]) / 2


def nanmean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan


def read_run(phase: str, variant: str, rate: float, seed: int, folder: Path) -> Run:
    """Read a run from its folder."""
    lines = read_jsonl(folder / "metrics.jsonl")
    parts = [lines[i : i + EVERY] for i in range(0, len(lines), EVERY)]
    curves = {
        name: [nanmean(map(value, part)) for part in parts] for name, value in COLUMNS.items()
    }
    return Run(phase, variant, rate, seed, curves)


def write_csv(runs: list[Run], path: Path) -> None:
    """Write a row for each run and mean."""
    with path.open("w", newline="") as stream:
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerow(["phase", "variant", "rate", "seed", "step", *COLUMNS])
        for run in runs:
            for i, values in enumerate(zip(*run.curves.values(), strict=True), 1):
                numbers = [f"{value:.5g}" for value in values]
                rows.writerow([run.phase, run.variant, run.rate, run.seed, i * EVERY, *numbers])


def read_csv(path: Path) -> list[Run]:
    """Read what :func:`write_csv` wrote."""
    found: dict[tuple, dict[str, list[float]]] = {}
    with path.open(newline="") as stream:
        for row in csv.DictReader(stream):
            key = row["phase"], row["variant"], float(row["rate"]), int(row["seed"])
            curves = found.setdefault(key, {name: [] for name in COLUMNS})
            for name, values in curves.items():
                values.append(float(row[name]))
    return [Run(*key, curves) for key, curves in found.items()]


def choose_rates(runs: list[Run]) -> dict[str, float]:
    """Map each objective to its learning rate: the highest accuracy over the last two evaluations.

    Args:
        runs: runs of all phases; those of the tuning count.
    """
    return {v: max(some, key=tuning_accuracy).rate for v, some in groups(runs, "tuning").items()}


def tuning_accuracy(run: Run) -> float:
    return nanmean(run.curves["accuracy"][-2:])


def write_results(runs: list[Run], sittings: dict[str, float], page: Path) -> str:
    """Write ``page``, its pictures and ``study.csv`` beside it.

    Args:
        runs: the finished runs.
        sittings: seconds of each call of the study, by its start.
        page: Markdown file; the part between the marks is replaced.

    Returns:
        Text to print.
    """
    record = page.with_name("study.csv")
    write_csv(runs, record)
    runs = read_csv(record)  # the page follows from the record, to the last digit
    text = f"{cost(runs, sittings)}\n\n{results(runs)}"
    old = page.read_text() if page.exists() else f"# Study\n\n{BEGIN}\n{END}\n"
    before, rest = old.split(BEGIN)
    pictures = "".join(f"\n![{title}]({name})\n" for name, title in draw(runs, page.parent).items())
    page.write_text(f"{before}{BEGIN}\n\n{text}{pictures}\n{END}{rest.split(END)[1]}")
    return f"{text}\nwritten: {page}"


def cost(runs: list[Run], sittings: dict[str, float]) -> str:
    steps = sum(EVERY * len(run.curves["reward"]) for run in runs)
    hours = ", ".join(
        f"{seconds / 3600:.2f} hours from {start}" for start, seconds in sittings.items()
    )
    return f"{len(runs)} runs, {steps:,} steps. Elapsed time: {hours}."


def results(runs: list[Run]) -> str:
    """Return the tables as Markdown."""
    final, ablations = (groups(runs, phase) for phase in ("final", "ablation"))
    parts = [
        "**Tuning.** Accuracy on validation prompts, mean of the last two evaluations.\n",
        tuning_table(runs),
        "**Objectives.** Accuracy on test prompts after the last step. Means over seeds, in "
        "brackets the lowest and the highest. ± is the 95% interval of the mean over seeds (t). "
        f"Reward and entropy are those of the last {EVERY} steps. Shares are of the trained "
        "tokens, over all steps. A collapse ends below half of the highest accuracy.\n",
        table(final),
        differences(final, groups(runs, "final").get("espo", [])),
        "Rank correlation of entropy and clipped share inside a run, from the second mean on "
        f"(Figure 5), mean over seeds: {correlations(final)}.\n",
    ]
    if ablations:
        steps = EVERY * len(next(iter(ablations.values()))[0].curves["reward"])
        parts += [
            f"**Ablations.** The same numbers after {steps} steps.\n",
            table(start_of_espo(final, steps) | ablations, with_goal=False),
            differences(ablations, start_of_espo(final, steps).get("espo", [])),
        ]
    return "\n".join(parts)


def groups(runs: list[Run], phase: str) -> dict[str, list[Run]]:
    """Map each variant of a phase to its runs."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run.phase == phase:
            found.setdefault(run.variant, []).append(run)
    return found


def start_of_espo(final: dict[str, list[Run]], steps: int) -> dict[str, list[Run]]:
    """Return the first ``steps`` of the final runs of ESPO that are finished."""
    runs = [
        replace(run, curves={k: v[: steps // EVERY] for k, v in run.curves.items()})
        for run in final.get("espo", [])
    ]
    return {"espo": runs} if runs else {}


def tuning_table(runs: list[Run]) -> str:
    """Format a row for each objective, a column for each learning rate, the chosen one bold."""
    tuned = groups(runs, "tuning")
    rates = sorted({run.rate for run in runs if run.phase == "tuning"})
    chosen = choose_rates(runs)
    rows = [f"| objective | {' | '.join(f'{rate:g}' for rate in rates)} |"]
    rows.append("|---" * (len(rates) + 1) + "|")
    for variant, some in tuned.items():
        by_rate = {run.rate: f"{tuning_accuracy(run):.3f}" for run in some}
        by_rate[chosen[variant]] = f"**{by_rate[chosen[variant]]}**"
        cells = [by_rate.get(rate, "") for rate in rates]
        rows.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def table(variants: dict[str, list[Run]], with_goal: bool = True) -> str:
    """Format a row for each variant. ``with_goal``: with the steps to :data:`GOAL`."""
    columns = [
        "variant", "seeds", "accuracy", "reward", "entropy", "outside clip range",
        "with a gradient", "collapses", *([f"steps to {GOAL:g}"] if with_goal else []),
    ]  # fmt: skip
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for variant, runs in variants.items():
        accuracy = [run.last("accuracy") for run in runs]
        goal = [run.steps_to_goal() for run in runs]
        cells = [
            variant,
            str(len(runs)),
            f"{spread(accuracy)}{interval(accuracy)}",
            spread([run.last("reward") for run in runs]),
            spread([run.last("entropy") for run in runs]),
            f"{nanmean(run.mean('clipped') for run in runs):.3f}",
            f"{nanmean(run.mean('with_gradient') for run in runs):.3f}",
            str(sum(run.collapsed() for run in runs)),
        ]
        if with_goal:
            steps = ("never" if math.isinf(step) else f"{step:.0f}" for step in sorted(goal))
            cells.append(", ".join(steps))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def spread(values: list[float]) -> str:
    return f"{nanmean(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def interval(values: list[float]) -> str:
    """Return half of the 95% interval of the mean of normal values, as text."""
    from scipy.stats import t

    if len(values) < 2:
        return ""
    half = t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return f" ± {half:.3f}"


def differences(variants: dict[str, list[Run]], espo: list[Run]) -> str:
    """Compare ESPO with the other variants, seed by seed."""
    of_seed = {run.seed: run for run in espo}
    rows = ["| ESPO minus | accuracy | seeds with ESPO ahead |", "|---|---|---|"]
    for variant, runs in variants.items():
        if variant == "espo":
            continue
        both = [(of_seed[run.seed], run) for run in runs if run.seed in of_seed]
        if not both:
            continue
        gaps = [mine.last("accuracy") - other.last("accuracy") for mine, other in both]
        ahead = f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}"
        rows.append(f"| {variant} | {nanmean(gaps):+.3f}{interval(gaps)} | {ahead} |")
    return "\n".join(rows) + "\n"


def correlations(variants: dict[str, list[Run]]) -> str:
    """Correlate entropy and clipped share.

    The first mean is left out: all runs begin with the entropy of the same model.
    """
    from scipy.stats import spearmanr

    found = []
    for variant, runs in variants.items():
        ranks = [spearmanr(r.curves["entropy"][1:], r.curves["clipped"][1:]) for r in runs]
        found.append(f"{variant} {nanmean(float(rank.statistic) for rank in ranks):+.2f}")
    return ", ".join(found)


def draw(runs: list[Run], folder: Path) -> dict[str, str]:
    """Draw the pictures. Return the title of each file."""
    final, ablations = groups(runs, "final"), groups(runs, "ablation")
    pictures = {}
    if final:
        pictures["study-objectives.png"] = "Six objectives: means over seeds; bands: all seeds"
        draw_curves(final, folder / "study-objectives.png")
        pictures["study-clipping.png"] = (
            "Clipped share by objective (Figure 4) and against entropy (Figure 5)"
        )
        draw_clipping(final, folder / "study-clipping.png")
    if ablations:
        pictures["study-ablations.png"] = "Ablations of ESPO"
        steps = EVERY * len(next(iter(ablations.values()))[0].curves["reward"])
        draw_curves(start_of_espo(final, steps) | ablations, folder / "study-ablations.png")
    return pictures


def draw_curves(variants: dict[str, list[Run]], path: Path) -> None:
    """Draw each of :data:`PANELS`: mean over seeds, and a band from the lowest to the highest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 4), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for variant, runs in variants.items():
            points = list(zip(*(run.curves[name] for run in runs), strict=False))
            steps = range(EVERY, EVERY * len(points) + 1, EVERY)
            (line,) = axes.plot(steps, list(map(nanmean, points)), label=variant, linewidth=1.5)
            low, high = list(map(min, points)), list(map(max, points))
            axes.fill_between(steps, low, high, alpha=0.12, color=line.get_color())
        axes.set(title=title, xlabel="step")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=100)


def draw_clipping(variants: dict[str, list[Run]], path: Path) -> None:
    """Draw the clipped share of each variant, and against the entropy at every mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    bars, points = figure.subplots(1, 2)
    for place, (variant, runs) in enumerate(variants.items()):
        shares = [run.mean("clipped") for run in runs]
        bars.bar(place, nanmean(shares), color=f"C{place}", alpha=0.6)
        bars.plot([place] * len(shares), shares, "k.", markersize=4)
        entropy, clipped = ([v for r in runs for v in r.curves[k]] for k in ("entropy", "clipped"))
        points.plot(entropy, clipped, ".", color=f"C{place}", label=variant, markersize=5)
    bars.set(title="Share of tokens outside the clip range", xticks=range(len(variants)))
    bars.set_xticklabels(variants)
    title = f"Means over {EVERY} steps of each run"
    points.set(title=title, xlabel="entropy (nats)", ylabel="share outside the clip range")
    points.set(yscale="log")
    points.legend(fontsize="small")
    figure.savefig(path, dpi=100)
