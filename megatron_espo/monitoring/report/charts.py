"""Draws the charts of ``metric_names.CHARTS`` from the metrics of runs."""

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_espo.monitoring.metric_names import (
    CHARTS,
    EXTREMES,
    GROUP_ENTROPY,
    PHASES,
    REWARD,
    Chart,
)
from megatron_espo.monitoring.report.runs import RunData, read_runs

if TYPE_CHECKING:  # matplotlib takes a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Distinct for readers who confuse red and green (after Okabe and Ito, darkened for a white
# background).
COLORS = ("#0b6fb8", "#d1560b", "#0a8f6c", "#b8467f", "#7a6a00", "#3aa0c9", "#6b4fc4", "#8a8f98")
MUTED, GRID = "#5a6475", "#dfe3ea"
MOST_POINTS = 400
_DASHES: tuple[Any, ...] = ("-", "--", ":", "-.")
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.prop_cycle": f"cycler('color', {list(COLORS)})",
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 5),
    "grid.color": GRID,
    "legend.fontsize": 8,
}
Draw = Callable[["Axes"], None]


@dataclass(frozen=True)
class Section:
    """Charts under one heading.

    Attributes:
        heading: title of the section.
        pictures: ``(title, data URI of an SVG)``.
        empty: titles of charts without anything to show.
    """

    heading: str
    pictures: list[tuple[str, str]]
    empty: list[str]


def draw_sections(runs: Sequence[RunData]) -> list[Section]:
    """Draw every chart that has something to show."""
    sections = []
    for heading, charts in CHARTS.items():
        shown: dict[str, Draw] = {
            chart.title: partial(draw_chart, chart=chart, runs=runs)
            for chart in charts
            if _shows(chart, runs)
        }
        empty = [chart.title for chart in charts if chart.title not in shown]
        if heading == "Entropy groups":
            shown |= _histograms(runs)
        pictures = [(title, _as_svg(title, draw)) for title, draw in shown.items()]
        sections.append(Section(heading, pictures, empty))
    return sections


def draw_learning_curve(folder: str | Path) -> Path:
    """Draw reward, entropy by group and seconds by phase of a run into its ``learning_curve.png``;
    returns the path.
    """
    runs = read_runs([folder])
    charts = (REWARD, GROUP_ENTROPY, PHASES)
    draws: dict[str, Draw] = {c.title: partial(draw_chart, chart=c, runs=runs) for c in charts}
    path = Path(folder, "learning_curve.png")
    _figure(draws, (12, 3.8), runs[0].name).savefig(path, dpi=120)
    return path


def draw_chart(axes: "Axes", chart: Chart, runs: Sequence[RunData]) -> None:
    """Draw a chart. With several runs a color stands for a run, and a line style for a metric."""
    from matplotlib.lines import Line2D

    if chart is PHASES:
        _draw_phases(axes, runs)
        return
    metrics = _metrics(chart, runs)
    for number, run in enumerate(runs):
        for kind, metric in enumerate(metrics):
            steps, values = thin(*run.series(metric))
            if not steps:
                continue
            color = COLORS[(number if len(runs) > 1 else kind) % len(COLORS)]
            style = _DASHES[kind % 4] if len(runs) > 1 else "-"
            marker, label = "o" if len(steps) < 3 else None, _label(metric, metrics)
            axes.plot(steps, values, color=color, linestyle=style, label=label, marker=marker)
            if band := _band(chart, run, metric):
                x, low, high = thin(*band)
                axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    if len(metrics) > 1 and len(runs) > 1:
        lines = [Line2D([], [], color=MUTED, linestyle=_DASHES[k % 4]) for k in range(len(metrics))]
        axes.legend(lines, [_label(metric, metrics) for metric in metrics])
    elif len(metrics) > 1:
        axes.legend()
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(_integers())
    if chart.log:
        axes.set_yscale("log")
    elif chart.floor and axes.get_ylim()[0] > 0:
        axes.set_ylim(bottom=0)


def _metrics(chart: Chart, runs: Sequence[RunData]) -> list[str]:
    """Metrics of the chart that any run reports."""
    found = (n for pattern in chart.patterns for run in runs for n in run.names(pattern))
    return list(dict.fromkeys(found))


def _shows(chart: Chart, runs: Sequence[RunData]) -> bool:
    """Whether any value differs from the neutral value: 1 for importance ratios, else 0."""
    neutral = 1.0 if chart.band == EXTREMES else 0.0
    names = [name + end for name in _metrics(chart, runs) for end in ("", *(chart.band or ()))]
    values = (value for run in runs for name in names for value in run.series(name)[1])
    return any(abs(value - neutral) > 1e-9 for value in values if math.isfinite(value))


def _band(chart: Chart, run: RunData, metric: str) -> tuple[list, ...] | None:
    """Steps, lower and upper ends of the band around a curve."""
    if chart is REWARD:
        steps, errors = run.series("reward/standard_error")
        means = dict(zip(*run.series(metric), strict=True))
        ends = [(means[s] - e, means[s] + e) for s, e in zip(steps, errors, strict=True)]
        return (steps, *map(list, zip(*ends, strict=True))) if ends else None
    if not chart.band:
        return None
    (steps, low), (_, high) = (run.series(metric + end) for end in chart.band)
    return (steps, low, high) if steps else None


def _label(metric: str, metrics: Sequence[str]) -> str:
    head, _, tail = metric.partition("/")
    if head.startswith("group"):
        groups = sorted({name.split("/")[0] for name in metrics})
        named = {groups[0]: "lowest-entropy group", groups[-1]: "highest-entropy group"}
        return named.get(head, head)
    if metric == "policy/clipped":
        return "this run's objective"
    return tail.removesuffix("_gib").removesuffix("_per_s").replace("_", " ")


def _draw_phases(axes: "Axes", runs: Sequence[RunData]) -> None:
    """Seconds by phase: stacked over the steps of one run, or a bar of the mean for each of several
    runs.
    """
    phases = list(dict.fromkeys(phase for run in runs for phase in run.phases))
    # A step without a phase counts as 0.
    seconds = [[[line.get(f"time/{p}_s", 0.0) for line in r.lines] for p in phases] for r in runs]
    if len(runs) == 1:
        steps = [line["step"] for line in runs[0].lines]
        axes.stackplot(*thin(steps, *seconds[0]), labels=phases)
        axes.set(xlabel="step", ylim=(0, None))
        axes.xaxis.set_major_locator(_integers())
    else:
        names, left = [_short(run.name) for run in runs], [0.0] * len(runs)
        for number, phase in enumerate(phases):
            width = [sum(run[number]) / len(run[number]) for run in seconds]
            axes.barh(names, width, left=left, label=phase, height=0.6)
            left = [a + b for a, b in zip(left, width, strict=True)]
        axes.set(xlabel="mean seconds of a step", ylim=(len(runs) - 0.5, -0.5))
    axes.legend(loc="upper right")


def _histograms(runs: Sequence[RunData]) -> dict[str, Draw]:
    """Entropies of trained tokens by group, in the first and the last step of each run that trained
    any.
    """
    draws: dict[str, Draw] = {}
    for run in runs:
        trained = [line for line in run.entropies if any(map(any, line["counts"]))]
        for line in {line["step"]: line for line in trained[:1] + trained[-1:]}.values():
            suffix = f", {_short(run.name)}" if len(runs) > 1 else ""
            title = f"Entropies of trained tokens, step {line['step']}{suffix}"
            draws[title] = partial(_draw_histogram, line=line)
    return draws


def _draw_histogram(axes: "Axes", line: dict) -> None:
    """A line of ``entropy.jsonl``: stacked histograms, and the mean boundaries between groups."""
    counts, names = line["counts"], [f"group{g}/" for g in range(len(line["counts"]))]
    bins, total = len(counts[0]), sum(map(sum, counts))
    width = line["highest"] / bins
    middles, bottom = [(i + 0.5) * width for i in range(bins)], [0.0] * bins
    for name, group in zip(names, counts, strict=True):
        share = [count / total for count in group]
        axes.bar(middles, share, width, bottom, label=_label(name, names))
        bottom = [a + b for a, b in zip(bottom, share, strict=True)]
    for boundary in filter(None, line["boundaries"]):
        label = "boundary (mean over responses)"
        axes.axvline(boundary, color=COLORS[2], linestyle="--", label=label)
    occupied = max(i for i, share in enumerate(bottom) if share)
    axes.set(xlabel="nats", ylabel="share of tokens", xlim=(0, (occupied + 2) * width))
    axes.legend()


def _figure(draws: dict[str, Draw], size: tuple[float, float], heading: str = "") -> "Figure":
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(heading.replace("$", r"\$"))
        panels = figure.subplots(1, len(draws), squeeze=False)[0]
        for axes, (title, draw) in zip(panels, draws.items(), strict=True):
            axes.set_title(title)
            draw(axes)
    return figure


def _as_svg(title: str, draw: Draw) -> str:
    from matplotlib import rc_context

    svg = io.BytesIO()
    with rc_context(_STYLE):
        _figure({title: draw}, (5.2, 3.0)).savefig(svg, format="svg", transparent=True)
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.getvalue()).decode()}"


def _integers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)


def _short(name: str) -> str:
    """A run's name, shortened. A dollar sign starts a formula in matplotlib."""
    return (name if len(name) <= 24 else f"{name[:11]}…{name[-12:]}").replace("$", r"\$")


def thin(*columns: list) -> tuple[list, ...]:
    """Means over equal stretches of the columns, so that long runs draw at most ``MOST_POINTS``
    points.
    """
    size = -(-len(columns[0]) // MOST_POINTS)
    if size <= 1:
        return columns
    return tuple(
        [sum(part) / len(part) for i in range(0, len(c), size) if (part := c[i : i + size])]
        for c in columns
    )
