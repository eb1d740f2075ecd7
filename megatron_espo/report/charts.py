"""How each chart of a report is drawn from the runs' metrics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_espo.metric_names import CHARTS, EXTREMES, Chart, as_pattern
from megatron_espo.report.drawing import COLORS, SIZE, Canvas, Picture, thin
from megatron_espo.report.runs import RunData

_DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Section:
    """Charts under one heading."""

    heading: str
    pictures: list[Picture]
    empty: list[str]


def draw_sections(runs: Sequence[RunData]) -> list[Section]:
    """Every chart that has something to show; the others by their titles."""
    sections = []
    for heading, charts in CHARTS.items():
        drawn = {chart.title: _draw(chart, runs) for chart in charts}
        pictures = [picture for picture in drawn.values() if picture]
        if heading == "Entropy groups":
            pictures += _draw_histograms(runs)
        if heading == "Time and machine":
            pictures = _draw_phases(runs) + pictures
        sections.append(Section(heading, pictures, [title for title, picture in drawn.items() if not picture]))
    return sections


def _draw(chart: Chart, runs: Sequence[RunData]) -> Picture | None:
    metrics = [name for listed in chart.metrics for run in runs for name in run.names(as_pattern(listed))]
    metrics = list(dict.fromkeys(metrics))
    shown = [name for name in metrics if any(_moves(run, name, chart) for run in runs)]
    if not shown:
        return None
    canvas = Canvas(chart.name, chart.title)
    for number, run in enumerate(runs):
        for kind, metric in enumerate(metrics):
            steps, values = run.series(metric)
            if not steps:
                continue
            color = COLORS[(number if len(runs) > 1 else kind) % len(COLORS)]
            x, y = thin(steps, values)
            style = _DASHES[kind % 4] if len(runs) > 1 else "-"
            canvas.axes.plot(x, y, color=color, linestyle=style, label=_label(metric, metrics), marker="o" if len(x) < 3 else None)
            _draw_band(canvas, chart, run, metric, color)
    if len(metrics) > 1:
        dashes = {_label(metric, metrics): _DASHES[kind % 4] for kind, metric in enumerate(metrics)}
        canvas.legend(dashes=dashes if len(runs) > 1 else None)
    canvas.axes.set_xlabel("step")
    if chart.log:
        canvas.axes.set_yscale("log")
    elif chart.floor and canvas.axes.get_ylim()[0] > 0:
        canvas.axes.set_ylim(bottom=0)
    return canvas.finish()


def _moves(run: RunData, metric: str, chart: Chart) -> bool:
    """Whether there is something to see: not all 0, and, where 1 is the resting value, not all 1."""
    resting = 1.0 if chart.band == EXTREMES else 0.0
    names = (metric, *(metric + end for end in chart.band or ()))
    return any(abs(value - resting) > 1e-9 for name in names for value in run.series(name)[1] if math.isfinite(value))


def _draw_band(canvas: Canvas, chart: Chart, run: RunData, metric: str, color: str) -> None:
    if metric == "reward/mean":
        steps, error = run.series("reward/standard_error")
        means = dict(zip(*run.series(metric), strict=True))
        low, high = ([means[s] + sign * e for s, e in zip(steps, error, strict=True)] for sign in (-1, 1))
    elif chart.band:
        (steps, low), (_, high) = (run.series(metric + end) for end in chart.band)
    else:
        return
    if steps:
        canvas.axes.fill_between(*thin(steps, low, high), color=color, alpha=0.18, linewidth=0)


def _label(metric: str, metrics: Sequence[str]) -> str:
    head, _, tail = metric.partition("/")
    if head.startswith("group"):
        groups = sorted({name.split("/")[0] for name in metrics})
        return {groups[0]: "lowest-entropy group", groups[-1]: "highest-entropy group"}.get(head, head)
    if metric == "policy/clipped":
        return "this run's objective"
    return tail.removesuffix("_gib").removesuffix("_per_s").replace("_", " ")


def _draw_phases(runs: Sequence[RunData]) -> list[Picture]:
    """Mean seconds a step by phase, a bar for each run; ``learning_curve.png`` shows them step by step."""
    phases = list(dict.fromkeys(phase for run in runs for phase in run.phases))
    if not phases:
        return []
    bars = Canvas("phases", "Seconds a step by phase (mean)", height=max(SIZE[1], 1.3 + 0.35 * len(runs)))
    left = [0.0] * len(runs)
    for phase, color in zip(phases, _cycle(len(phases)), strict=True):
        # A phase that not every step has counts as 0 in the others.
        width = [sum(run.series(f"time/{phase}_s")[1]) / len(run.lines) for run in runs]
        bars.axes.barh([_short(run.name) for run in runs], width, left=left, color=color, label=phase, height=0.6)
        left = [a + b for a, b in zip(left, width, strict=True)]
    bars.axes.set_ylim(max(len(runs), 3) - 0.5, -0.5)  # from the top; a single bar is not a wall
    bars.axes.grid(axis="y", visible=False)
    bars.axes.set_xlabel("seconds")
    bars.legend(below=True)
    return [bars.finish(integer_steps=False)]


def _draw_histograms(runs: Sequence[RunData]) -> list[Picture]:
    """Entropies of trained tokens by group, first and last step with any, with the mean border between groups."""
    pictures = []
    for number, run in enumerate(runs):
        trained = [line for line in run.entropies if any(map(any, line["counts"]))]
        for when, line in dict(zip(("first", "last"), (trained[0], trained[-1]), strict=True)).items() if trained else ():
            suffix = f", {_short(run.name)}" if len(runs) > 1 else ""
            canvas = Canvas(f"entropies_{number}_{when}", f"Entropies of trained tokens, step {line['step']}{suffix}")
            bins = len(line["counts"][0])
            width = line["highest"] / bins
            total, bottom = sum(map(sum, line["counts"])), [0.0] * bins
            for group, counts in enumerate(line["counts"]):
                label = _label(f"group{group}/", [f"group{g}/" for g in range(len(line["counts"]))])
                share = [count / total for count in counts]
                canvas.axes.bar([(i + 0.5) * width for i in range(bins)], share, width, bottom, color=COLORS[group % len(COLORS)], label=label)
                bottom = [a + b for a, b in zip(bottom, share, strict=True)]
            for border in filter(None, line["borders"]):
                canvas.axes.axvline(border, color=COLORS[2], linestyle="--", label="border (mean over responses)")
            occupied = max(i for i, share in enumerate(bottom) if share)
            canvas.axes.set(xlabel="nats", ylabel="share of tokens", xlim=(0, (occupied + 2) * width))
            canvas.legend()
            pictures.append(canvas.finish(integer_steps=False))
    return pictures


def _short(name: str) -> str:
    """A run's name in a picture, where dollars would start a formula."""
    return (name if len(name) <= 24 else f"{name[:11]}…{name[-12:]}").replace("$", r"\$")


def _cycle(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]
