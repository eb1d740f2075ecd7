"""The charts of a report, drawn from the metrics of runs."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import rc_context, rc_params_from_file
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # no pyplot: no global state, no display
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from megatron_espo.monitoring.report.runs import RunData, read_runs

STYLE: Any = rc_params_from_file(
    Path(__file__).with_name("charts.mplstyle"), use_default_template=False
)
COLORS: list[str] = STYLE["axes.prop_cycle"].by_key()["color"]
_DASHES: tuple[Any, ...] = ("-", "--", ":", "-.")
# A chart of more points is a picture inside the SVG, so that long runs have small pages.
MOST_POINTS = 1000
_RASTER_ZORDER = 2.5  # above lines, below text
Draw = Callable[[Axes], None]


@dataclass(frozen=True)
class Chart:
    """Curves over steps.

    Attributes:
        title: what the chart shows.
        metrics: regular expression of the metrics' names; each metric is a curve.
        band: suffixes of the metrics at the lower and the upper end of a curve's band.
        floor: the vertical axis includes 0.
        log: the vertical axis is logarithmic.
    """

    title: str
    metrics: str
    band: tuple[str, str] = ("_low", "_high")
    floor: bool = True
    log: bool = False


_WOULD_CLIP = "Share of tokens outside the clip range, here and of others"
_ENVIRONMENT = "Turns of a trajectory, splits and failures of a step"
_RATIO = "Importance ratio by group (mean, range)"
REWARD = Chart("Reward (mean ± standard error)", "reward/mean")
GROUP_ENTROPY = Chart("Entropy by group (nats)", r"group\d+/entropy")
PHASES = Chart("Seconds by phase", r"time/\w+_s")
CHARTS: dict[str, tuple[Chart, ...]] = {
    "Learning": (
        REWARD,
        Chart("Held-out prompts: avg@k and pass@k, with intervals", r"eval/(avg|pass)@\d+"),
        Chart("Share of prompts solved by all, by none", "reward/solved_.*"),
    ),
    "Entropy groups": (
        GROUP_ENTROPY,
        Chart("Clip range by group (ε)", r"group\d+/epsilon"),
        Chart(_RATIO, r"group\d+/ratio", ("_min", "_max"), floor=False),
        Chart("Share of a group without gradient (clipped)", r"group\d+/no_gradient"),
        Chart(_WOULD_CLIP, r"policy/clipped|would_clip/\w+"),
    ),
    "Responses and the engine": (
        Chart("Response length (tokens)", "rollout/length_.*"),
        Chart("Share truncated, with advantage", "rollout/(truncated|with_advantage)"),
        Chart(_ENVIRONMENT, "environment/(turns|splits|failed)"),
        Chart("|engine − trainer| log-prob (nats)", "mismatch/logprob_gap_.*", log=True),
    ),
    "Optimisation": (
        Chart("Entropy of trained tokens (nats)", "policy/entropy"),
        Chart("Gradient norm before clipping", "optimizer/grad_norm"),
        Chart("Learning rate", "optimizer/lr"),
        Chart("KL to the initial policy (nats)", "kl/reference"),
    ),
    "Time and machine": (
        PHASES,
        Chart("Tokens a second", "throughput/.*_tokens_per_s"),
        Chart("Model FLOPs utilisation", "throughput/mfu"),
        Chart("Memory (GiB)", "system/.*"),
    ),
}


def draw_sections(runs: Sequence[RunData]) -> dict[str, dict[str, str]]:
    """Draw every chart that has a value other than 0: heading -> title -> data URI of an SVG."""
    sections = {}
    for heading, charts in CHARTS.items():
        shown: dict[str, Draw] = {
            c.title: partial(draw_chart, chart=c, runs=runs) for c in charts if _shows(c, runs)
        }
        if heading == "Entropy groups":
            shown |= _histograms(runs)
        if shown:
            sections[heading] = {title: _as_svg(title, draw) for title, draw in shown.items()}
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


def draw_chart(axes: Axes, chart: Chart, runs: Sequence[RunData]) -> None:
    """Draw a chart. With several runs a color stands for a run, and a line style for a metric."""
    if max(len(run.lines) for run in runs) > MOST_POINTS:
        axes.set_rasterization_zorder(_RASTER_ZORDER)
    if chart is PHASES:
        _draw_phases(axes, runs)
        return
    metrics, several = _metrics(chart, runs), len(runs) > 1
    for number, run in enumerate(runs):
        for kind, metric in enumerate(metrics):
            steps, values = run.series(metric)
            color = COLORS[(number if several else kind) % len(COLORS)]
            axes.plot(
                steps,
                values,
                color=color,
                linestyle=_DASHES[kind % 4] if several else "-",
                marker="o" if len(steps) < 3 else None,
                label=_label(metric, metrics),
            )
            (x, low), (_, high) = (run.series(metric + end) for end in chart.band)
            axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    if len(metrics) > 1:
        lines = [
            Line2D([], [], color=STYLE["axes.labelcolor"], linestyle=_DASHES[k % 4])
            for k in range(len(metrics))
        ]
        labels = [_label(metric, metrics) for metric in metrics]
        axes.legend(lines if several else axes.get_lines(), labels)
    _count_steps(axes)
    if chart.log:
        axes.set_yscale("log")
    elif chart.floor and axes.get_ylim()[0] > 0:
        axes.set_ylim(bottom=0)


def _metrics(chart: Chart, runs: Sequence[RunData]) -> list[str]:
    """Metrics of the chart that any run reports."""
    return list(dict.fromkeys(name for run in runs for name in run.names(chart.metrics)))


def _shows(chart: Chart, runs: Sequence[RunData]) -> bool:
    return any(any(run.series(name)[1]) for run in runs for name in _metrics(chart, runs))


def _label(metric: str, metrics: Sequence[str]) -> str:
    head, _, tail = metric.partition("/")
    if head.startswith("group"):
        groups = sorted({name.split("/")[0] for name in metrics})
        named = {groups[0]: "lowest-entropy group", groups[-1]: "highest-entropy group"}
        return named.get(head, head)
    if metric == "policy/clipped":
        return "this run's objective"
    return tail.removesuffix("_gib").removesuffix("_per_s").replace("_", " ")


def _draw_phases(axes: Axes, runs: Sequence[RunData]) -> None:
    """Seconds by phase: stacked over the steps of one run, or a bar of the mean for each of several
    runs.
    """
    phases = list(dict.fromkeys(phase for run in runs for phase in run.phases))
    # A step without a phase counts as 0.
    seconds = [[[line.get(f"time/{p}_s", 0.0) for line in r.lines] for p in phases] for r in runs]
    if len(runs) == 1:
        axes.stackplot([line["step"] for line in runs[0].lines], *seconds[0], labels=phases)
        axes.set_ylim(0, None)
        _count_steps(axes)
    else:
        names, left = [_plain(run.name) for run in runs], [0.0] * len(runs)
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
        for line in trained[:1] + trained[1:][-1:]:
            suffix = f", {_plain(run.name)}" if len(runs) > 1 else ""
            title = f"Entropies of trained tokens, step {line['step']}{suffix}"
            draws[title] = partial(_draw_histogram, line=line)
    return draws


def _draw_histogram(axes: Axes, line: dict) -> None:
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


def _figure(draws: dict[str, Draw], size: tuple[float, float], heading: str = "") -> Figure:
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(_plain(heading))
        panels = figure.subplots(1, len(draws), squeeze=False)[0]
        for axes, (title, draw) in zip(panels, draws.items(), strict=True):
            axes.set_title(title)
            draw(axes)
    return figure


def _as_svg(title: str, draw: Draw) -> str:
    svg = io.BytesIO()
    with rc_context(STYLE):
        _figure({title: draw}, (5.2, 3.0)).savefig(svg, format="svg", transparent=True, dpi=120)
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.getvalue()).decode()}"


def _count_steps(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _plain(name: str) -> str:
    """Text for matplotlib, where a dollar sign starts a formula."""
    return name.replace("$", r"\$")
