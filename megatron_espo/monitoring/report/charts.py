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
from matplotlib.ticker import MaxNLocator

from megatron_espo.monitoring.report.runs import RunData, read_runs

STYLE: Any = rc_params_from_file(
    Path(__file__).with_name("charts.mplstyle"), use_default_template=False
)
COLORS: list[str] = STYLE["axes.prop_cycle"].by_key()["color"]
_LINE_STYLES = ("-", "--", ":", "-.")
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


REWARD = Chart("Reward (mean ± standard error)", "reward/mean")
GROUP_ENTROPY = Chart("Entropy by group (nats; group0 is the lowest)", r"group\d+/entropy")
PHASES = Chart("Seconds by phase of a step", "time/step_s")
CHARTS: dict[str, tuple[Chart, ...]] = {
    "Learning": (
        REWARD,
        Chart("Held-out prompts: avg@k and pass@k, with intervals", r"eval/(avg|pass)@\d+"),
        Chart("Share of prompts solved by all, by none", "reward/solved_.*"),
    ),
    "Entropy groups": (
        GROUP_ENTROPY,
        Chart("Clip range by group (ε)", r"group\d+/epsilon"),
        Chart("Ratio by group (range)", r"group\d+/ratio", ("_min", "_max"), floor=False),
        Chart("Share of a group without gradient (clipped)", r"group\d+/no_gradient"),
        Chart("Share of tokens outside clip ranges", r"policy/clipped|would_clip/\w+"),
    ),
    "Responses and the engine": (
        Chart("Response length (tokens)", "rollout/length_.*"),
        Chart("Share truncated, with advantage", "rollout/(truncated|with_advantage)"),
        Chart("Turns, splits and failures", "environment/(turns|splits|failed)"),
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
    """Draw every chart that has a value other than 0: heading -> title -> data URI of a PNG."""
    sections = {}
    for heading, charts in CHARTS.items():
        draws: dict[str, Draw] = {
            c.title: partial(draw_chart, chart=c, runs=runs) for c in charts if _has(c, runs)
        }
        if heading == "Entropy groups":
            draws |= _histograms(runs)
        if draws:
            sections[heading] = {
                title: _data_uri(_picture({title: draw}, (5.2, 3.0), transparent=True))
                for title, draw in draws.items()
            }
    return sections


def draw_learning_curve(folder: str | Path) -> Path:
    """Draw reward, entropy by group and seconds by phase of a run into its ``learning_curve.png``;
    returns the path.
    """
    runs = read_runs([folder])
    charts = (REWARD, GROUP_ENTROPY, PHASES)
    draws: dict[str, Draw] = {c.title: partial(draw_chart, chart=c, runs=runs) for c in charts}
    path = Path(folder, "learning_curve.png")
    path.write_bytes(_picture(draws, (12, 3.8), runs[0].name))
    return path


def draw_chart(axes: Axes, chart: Chart, runs: Sequence[RunData]) -> None:
    """Draw a chart. With several runs a color stands for a run, and a line style for a metric."""
    metrics, several = _metrics(chart, runs), len(runs) > 1
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if chart is PHASES and not several:
        _stack_phases(axes, runs[0])
        return
    for number, run in enumerate(runs):
        for kind, metric in enumerate(metrics):
            steps, values = run.series(metric)
            color = COLORS[(number if several else kind) % len(COLORS)]
            axes.plot(
                steps,
                values,
                color=color,
                linestyle=_LINE_STYLES[kind % 4] if several else "-",
                marker="o" if len(steps) < 3 else None,
                label=_label(metric) if number == 0 else None,
            )
            (x, low), (_, high) = (run.series(metric + end) for end in chart.band)
            axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    if len(metrics) > 1:
        axes.legend()
    if chart.log:
        axes.set_yscale("log")
    elif chart.floor and axes.get_ylim()[0] > 0:
        axes.set_ylim(bottom=0)


def _metrics(chart: Chart, runs: Sequence[RunData]) -> list[str]:
    """Metrics of the chart that any run reports."""
    return list(dict.fromkeys(name for run in runs for name in run.names(chart.metrics)))


def _has(chart: Chart, runs: Sequence[RunData]) -> bool:
    return any(any(run.series(name)[1]) for run in runs for name in _metrics(chart, runs))


def _label(metric: str) -> str:
    head, _, tail = metric.partition("/")
    return head if head.startswith("group") else tail.replace("_", " ")


def _stack_phases(axes: Axes, run: RunData) -> None:
    """Seconds by phase. A step without a phase counts as 0."""
    seconds = [[line.get(f"time/{name}_s", 0.0) for line in run.lines] for name in run.phases]
    axes.stackplot([line["step"] for line in run.lines], *seconds, labels=run.phases)
    axes.set_ylim(0, None)
    axes.legend(loc="upper right")


def _histograms(runs: Sequence[RunData]) -> dict[str, Draw]:
    """Entropies of trained tokens by group, in the first and the last step of each run that trained
    any.
    """
    draws: dict[str, Draw] = {}
    for run in runs:
        trained = [line for line in run.entropies if any(map(any, line["counts"]))]
        for line in trained[:1] + trained[1:][-1:]:
            title = f"Entropies of trained tokens, step {line['step']}"
            draws[f"{title}, {run.name}" if len(runs) > 1 else title] = partial(
                _draw_histogram, line=line
            )
    return draws


def _draw_histogram(axes: Axes, line: dict) -> None:
    """A line of ``entropy.jsonl``: stacked histograms, and the mean boundaries between groups."""
    counts, highest = line["counts"], line["highest"]
    bins, groups = len(counts[0]), len(counts)
    middles = [(i + 0.5) * highest / bins for i in range(bins)]
    axes.hist(
        [middles] * groups,
        bins=bins,
        range=(0, highest),
        weights=counts,
        stacked=True,
        label=[f"group{number}" for number in range(groups)],
    )
    for boundary in filter(None, line["boundaries"]):
        axes.axvline(boundary, color=COLORS[2], linestyle="--", label="boundary (mean)")
    occupied = max(x for x, *group in zip(middles, *counts, strict=True) if any(group))
    axes.set(xlabel="nats", ylabel="tokens", xlim=(0, occupied + highest / bins))
    axes.legend()


def _picture(
    draws: dict[str, Draw], size: tuple[float, float], heading: str = "", transparent: bool = False
) -> bytes:
    """A PNG of charts side by side. ``size``: in inches, at 120 dots per inch."""
    png = io.BytesIO()
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(_plain(heading))
        panels = figure.subplots(1, len(draws), squeeze=False)[0]
        for axes, (title, draw) in zip(panels, draws.items(), strict=True):
            axes.set_title(_plain(title))
            draw(axes)
        figure.savefig(png, transparent=transparent, dpi=120)
    return png.getvalue()


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _plain(text: str) -> str:
    """Text for matplotlib, where a dollar sign starts a formula."""
    return text.replace("$", r"\$")
