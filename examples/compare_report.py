"""Writes the table, pictures and page of ``compare_objectives.py``."""

import datetime
import json
import math
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from megatron_espo.files import read_jsonl

BEGIN, END = (
    "<!-- results: written by examples/compare_objectives.py -->",
    "<!-- end of results -->",
)
LAST = 3  # steps that count as the end of a run
OLDER = {"espo-one-step-off", "espo-partial"}  # variants on rollouts of older weights
PANELS = {
    "reward/mean": "Reward",
    "policy/entropy": "Entropy of trained tokens (nats)",
    "policy/clipped": "Share outside the clip range",
    "with_gradient": "Share with a gradient",
}


@dataclass(frozen=True)
class Run:
    """The metrics of a finished run."""

    task: str
    variant: str
    seed: int
    lines: list[dict[str, float]]

    def curve(self, name: str) -> list[float]:
        """Return one metric over the steps; NaN where a step trained nothing."""
        if name == "with_gradient":
            return [1 - line.get("policy/no_gradient", math.nan) for line in self.lines]
        return [line.get(name, math.nan) for line in self.lines]

    def mean(self, name: str, last: int = 0) -> float:
        return nanmean(self.curve(name)[-last:])


def nanmean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan


NUMBERS: dict[str, Callable[[Run], float]] = {
    "held-out, greedy": lambda run: run.mean("eval/avg@1"),
    f"reward, last {LAST}": lambda run: run.mean("reward/mean", LAST),
    "reward, all": lambda run: run.mean("reward/mean"),
    f"entropy, last {LAST}": lambda run: run.mean("policy/entropy", LAST),
    "outside clip range": lambda run: run.mean("policy/clipped"),
    "with a gradient": lambda run: run.mean("with_gradient"),
}


def write_results(
    found: list[tuple[str, str, int, Path]], out: Path, page: Path | None, command: str
) -> str:
    """Write the pictures and the results.

    Args:
        found: task, variant, seed and folder of each run.
        out: folder for both if there is no page.
        page: Markdown file for the results; the pictures go to its folder.
        command: for the page.

    Returns:
        Text to print.
    """
    runs = [
        Run(task, variant, seed, read_jsonl(Path(folder, "metrics.jsonl")))
        for task, variant, seed, folder in found
    ]
    folder = page.parent if page else out
    pictures = draw_all(runs, folder)
    size, price = f"{len(runs)} runs of {len(runs[0].lines)} steps", cost([f for *_, f in found])
    text = [
        f"`{command}` on {datetime.date.today()}: {size}. {price}\n",
        table(runs),
        "Means over seeds, in brackets the lowest and the highest. Shares are of the tokens of "
        "responses that have an advantage.\n",
        claims(runs),
        correlations(objectives_of(runs)),
        *(f"![{caption}]({path.name})\n" for caption, path in pictures.items()),
    ]
    body = "\n".join(text)
    target = page or out / "study.md"
    old = page.read_text() if page else f"# Study\n\n{BEGIN}\n{END}\n"
    before, rest = old.split(BEGIN)
    target.write_text(f"{before}{BEGIN}\n\n{body}\n{END}{rest.split(END)[1]}")
    written = f"written: {target} and {len(pictures)} pictures beside it"
    return f"{table(runs)}\n{claims(runs)}\n{written}"


def cost(folders: list[Path]) -> str:
    """Describe the time of the runs. On idle cores, the processor time is the elapsed time."""
    wall = [json.loads((folder / "summary.json").read_text())["seconds"] for folder in folders]
    processor = [json.loads((folder / "processor_seconds.json").read_text()) for folder in folders]
    cores = len(os.sched_getaffinity(0))
    return (
        f"{cores} cores ({platform.machine()}); a run took {fmean(wall):.0f} s, of which "
        f"{fmean(processor):.0f} s of processor time, all together "
        f"{sum(processor) / cores / 3600:.1f} hours of each core."
    )


def grouped(runs: list[Run]) -> dict[tuple[str, str], list[Run]]:
    """Map task and variant to the runs of all seeds, in the order of the plan."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.task, run.variant), []).append(run)
    return dict(sorted(groups.items(), key=lambda item: item[0][0], reverse=True))


def table(runs: list[Run]) -> str:
    """Format a row for each task and variant."""
    rows = [
        f"| task | variant | seeds | {' | '.join(NUMBERS)} |",
        "|---" * (len(NUMBERS) + 3) + "|",
    ]
    for (task, variant), seeds in grouped(runs).items():
        cells = [spread([number(run) for run in seeds]) for number in NUMBERS.values()]
        rows.append(f"| {task} | {variant} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def spread(values: list[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    interval = f" ({min(known):.2f}–{max(known):.2f})" if len(known) > 1 else ""
    return f"{nanmean(known):.2f}{interval}"


def claims(runs: list[Run]) -> str:
    """Count the pairs of runs (same task and seed) that agree with the paper's claims."""
    of = {(run.task, run.seed, run.variant): run for run in runs}
    last, others = f", last {LAST}", ["gspo", "grpo", "dapo", "cispo", "gmpo"]
    ablations = sorted({run.variant for run in runs if run.variant.startswith("espo-")})
    pairs = [
        ("ESPO ends with a higher reward than", f"reward{last}", others),
        ("ESPO ends with a higher entropy than", f"entropy{last}", others),
        (
            "more tokens outside the clip range under ESPO than under (Figure 4)",
            "outside clip range",
            others,
        ),
        ("ESPO as it is ends with a higher reward than", f"reward{last}", ablations),
    ]
    rows = ["| | than | pairs in which it was so | mean difference |", "|---|---|---|---|"]
    for claim, name, variants in pairs:
        number = NUMBERS[name]
        for other in variants:
            keys = [(task, seed) for task, seed, variant in of if variant == other]
            both = [(of[*key, "espo"], of[*key, other]) for key in keys if (*key, "espo") in of]
            gaps = [number(espo) - number(run) for espo, run in both]
            if gaps := [gap for gap in gaps if not math.isnan(gap)]:
                share = f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}"
                rows.append(f"| {claim} | {other} | {share} | {nanmean(gaps):+.3f} |")
    return "\n".join(rows) + "\n"


def objectives_of(runs: list[Run]) -> list[Run]:
    """Return the runs without ablations and older rollouts."""
    return [run for run in runs if "-" not in run.variant]


def correlations(runs: list[Run]) -> str:
    """Correlate the points of :func:`draw_clipping`, without the first step.

    In the first step, all runs have the entropy of the same model.
    """
    from scipy.stats import spearmanr

    points: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        points.setdefault(run.variant, []).extend(
            zip(run.curve("policy/entropy")[1:], run.curve("policy/clipped")[1:], strict=True)
        )
    found = [
        f"{name} {spearmanr(pairs, nan_policy='omit').statistic:+.2f}"
        for name, pairs in points.items()
    ]
    title = (
        "Rank correlation of entropy and clipped share over steps, from the second on (Figure 5)"
    )
    return f"{title}: {', '.join(found)}.\n"


def draw_all(runs: list[Run], folder: Path) -> dict[str, Path]:
    """Draw all pictures. Return the file of each caption."""
    folder.mkdir(parents=True, exist_ok=True)
    objectives = objectives_of(runs)
    ablations = [run for run in runs if run.variant.startswith("espo") and run.variant not in OLDER]
    older = [run for run in runs if run.variant in OLDER | {"espo"}]
    pictures = {}
    for task in dict.fromkeys(run.task for run in runs):
        mine = {variant: seeds for (t, variant), seeds in grouped(objectives).items() if t == task}
        caption = f"Objectives on {task}: mean over seeds, bands from the lowest to the highest"
        pictures[caption] = draw_curves(mine, folder / f"study-{task}.png")
    caption = (
        "Clipped share by objective, as in the paper's Figure 4; entropy against clipped share, "
        "as in its Figure 5"
    )
    pictures[caption] = draw_clipping(objectives, folder / "study-clipping.png")
    for caption, some, name in (
        ("Ablations of ESPO", ablations, "ablations"),
        ("ESPO on older rollouts", older, "older"),
    ):
        if len({run.variant for run in some}) > 1:
            groups = grouped(some).items()
            mine = {variant: seeds for (t, variant), seeds in groups if t == runs[0].task}
            pictures[caption] = draw_curves(mine, folder / f"study-{name}.png")
    return pictures


def draw_curves(variants: dict[str, list[Run]], path: Path) -> Path:
    """Draw each of :data:`PANELS`: mean over seeds, and a band from the lowest to the highest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.8), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for variant, seeds in variants.items():
            columns = [
                [v for v in column if not math.isnan(v)] or [math.nan]
                for column in zip(*(run.curve(name) for run in seeds), strict=False)
            ]
            steps = range(1, len(columns) + 1)
            (line,) = axes.plot(
                steps, [fmean(column) for column in columns], label=variant, linewidth=1.5
            )
            low, high = list(map(min, columns)), list(map(max, columns))
            axes.fill_between(steps, low, high, alpha=0.15, color=line.get_color())
        axes.set(title=title, xlabel="step", ylim=(0, None))
        axes.locator_params(axis="x", integer=True)
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    return path


def draw_clipping(runs: list[Run], path: Path) -> Path:
    """Draw the clipped share of each variant, and entropy against clipped share of each step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    bars, points = figure.subplots(1, 2)
    for place, variant in enumerate(dict.fromkeys(run.variant for run in runs)):
        mine = [run for run in runs if run.variant == variant]
        shares = [run.mean("policy/clipped") for run in mine]
        bars.bar(place, nanmean(shares), color=f"C{place}", alpha=0.6)
        bars.plot([place] * len(shares), shares, "k.", markersize=4)
        entropies, clipped = (
            [v for run in mine for v in run.curve(name)]
            for name in ("policy/entropy", "policy/clipped")
        )
        points.plot(entropies, clipped, ".", color=f"C{place}", label=variant, markersize=5)
    bars.set(title="Share of tokens outside the clip range", xticks=range(place + 1))
    bars.set_xticklabels(dict.fromkeys(run.variant for run in runs))
    points.set(
        title="Each step of each run",
        xlabel="entropy of trained tokens (nats)",
        ylabel="share outside the clip range",
    )
    points.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    return path
