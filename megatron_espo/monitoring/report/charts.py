"""The charts of a report, drawn from the metrics of runs."""

import base64
import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context, rc_params_from_file
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # no pyplot: no global state, no display

from megatron_espo.monitoring.report.runs import RunData, read_runs

STYLE: Any = rc_params_from_file(
    Path(__file__).with_name("charts.mplstyle"), use_default_template=False
)
COLORS: list[str] = STYLE["axes.prop_cycle"].by_key()["color"]
_LINE_STYLES = ("-", "--", ":", "-.")
# Suffixes of the metrics at the lower and the upper end of a curve's band.
_BANDS = (("_low", "_high"), ("_min", "_max"))
_PHASES, _GAPS = "time/step_s", "mismatch/logprob_gap_.*"
# Heading -> title -> regular expression of the metrics' names; each metric is a curve over steps.
CHARTS = {
    "Learning": {
        "Reward (mean ± standard error)": "reward/mean",
        "Held-out prompts: avg@k and pass@k, with intervals": r"eval/(avg|pass)@\d+",
        "Share of prompts solved by all, by none": "reward/solved_.*",
    },
    "Entropy groups": {
        "Entropy by group (nats; group0 is the lowest)": r"group\d+/entropy",
        "Clip range by group (ε)": r"group\d+/epsilon",
        "Ratio by group (range)": r"group\d+/ratio",
        "Share of a group without gradient (clipped)": r"group\d+/no_gradient",
        "Share of tokens outside clip ranges": r"policy/clipped|would_clip/\w+",
    },
    "Responses and the engine": {
        "Response length (tokens)": "rollout/length_.*",
        "Share truncated, with advantage": "rollout/(truncated|with_advantage)",
        "Turns, splits and failures": "environment/(turns|splits|failed)",
        "|engine − trainer| log-prob (nats)": _GAPS,
    },
    "Optimisation": {
        "Entropy of trained tokens (nats)": "policy/entropy",
        "Gradient norm before clipping": "optimizer/grad_norm",
        "Learning rate": "optimizer/lr",
        "KL to the initial policy (nats)": "kl/reference",
    },
    "Time and machine": {
        "Seconds by phase of a step": _PHASES,
        "Tokens a second": "throughput/.*_tokens_per_s",
        "Model FLOPs utilisation": "throughput/mfu",
        "Memory (GiB)": "system/.*",
    },
}
_CURVE_SECTIONS = ("Learning", "Entropy groups", "Time and machine")
Draw = Callable[[Axes], None]


def draw_sections(runs: Sequence[RunData]) -> dict[str, dict[str, str]]:
    """Draw every chart that has a value other than 0: heading -> title -> data URI of a PNG."""
    sections = {}
    for heading, charts in CHARTS.items():
        draws: dict[str, Draw] = {
            title: partial(draw_chart, pattern=pattern, runs=runs)
            for title, pattern in charts.items()
            if any(any(run.series(name)[1]) for run in runs for name in run.names(pattern))
        }
        if heading == "Entropy groups":
            draws |= _histograms(runs)
        if draws:
            sections[heading] = {title: _data_uri(title, draw) for title, draw in draws.items()}
    return sections


def draw_learning_curve(folder: str | Path) -> Path:
    """Draw reward, entropy by group and seconds by phase of a run into its ``learning_curve.png``;
    returns the path.
    """
    runs = read_runs([folder])
    draws: dict[str, Draw] = {}
    for heading in _CURVE_SECTIONS:
        title, pattern = next(iter(CHARTS[heading].items()))
        draws[title] = partial(draw_chart, pattern=pattern, runs=runs)
    path = Path(folder, "learning_curve.png")
    path.write_bytes(_picture(draws, (12, 3.8)))
    return path


def draw_chart(axes: Axes, pattern: str, runs: Sequence[RunData]) -> None:
    """Draw the metrics whose name matches ``pattern``. With several runs a color stands for a run,
    and a line style for a metric.
    """
    several = len(runs) > 1
    axes.set_xlabel("step")
    axes.locator_params(axis="x", integer=True)
    if pattern == _PHASES and not several:
        _stack_phases(axes, runs[0])
        return
    metrics = list(dict.fromkeys(name for run in runs for name in run.names(pattern)))
    for number, run in enumerate(runs):
        for kind, metric in enumerate(metrics):
            steps, values = run.series(metric)
            color = f"C{number if several else kind}"
            axes.plot(
                steps,
                values,
                color=color,
                linestyle=_LINE_STYLES[kind % 4] if several else "-",
                marker="o" if len(steps) < 3 else None,
                label=metric if number == 0 else None,
            )
            for ends in _BANDS:
                (x, low), (_, high) = (run.series(metric + end) for end in ends)
                axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    if len(metrics) > 1:
        axes.legend()
    if pattern == _GAPS:
        axes.set_yscale("log")


def _stack_phases(axes: Axes, run: RunData) -> None:
    """Seconds by phase. A step without a phase counts as 0."""
    seconds = [[line.get(f"time/{name}_s", 0.0) for line in run.lines] for name in run.phases]
    axes.stackplot([line["step"] for line in run.lines], *seconds, labels=run.phases)
    axes.legend(loc="upper right")


def _histograms(runs: Sequence[RunData]) -> dict[str, Draw]:
    """Entropies of trained tokens by group, in the first and the last step of each run that trained
    any.
    """
    draws: dict[str, Draw] = {}
    for run in runs:
        trained = [line for line in run.entropies if np.any(line["counts"])]
        for line in trained[:1] + trained[-1:]:
            title = f"Entropies of trained tokens, step {line['step']}, {run.name}"
            draws[title] = partial(_draw_histogram, line=line)
    return draws


def _draw_histogram(axes: Axes, line: dict[str, Any]) -> None:
    """A line of ``entropy.jsonl``: stacked histograms, and the mean boundaries between groups."""
    counts = np.array(line["counts"])
    width, occupied = line["highest"] / counts.shape[1], np.flatnonzero(counts.any(0))[-1] + 1
    labels = [f"group{number}" for number in range(len(counts))]
    middles = (np.arange(occupied) + 0.5) * width
    axes.stackplot(middles, counts[:, :occupied], labels=labels, step="mid")
    for boundary in filter(None, line["boundaries"]):
        axes.axvline(boundary, color="C2", linestyle="--", label="boundary (mean)")
    axes.set(xlabel="nats", ylabel="tokens")
    axes.legend()


def _picture(draws: dict[str, Draw], size: tuple[float, float], transparent: bool = False) -> bytes:
    """A PNG of charts side by side. ``size``: in inches, at 120 dots per inch."""
    png = io.BytesIO()
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, len(draws), squeeze=False)[0]
        for axes, (title, draw) in zip(panels, draws.items(), strict=True):
            axes.set_title(title, parse_math=False)
            draw(axes)
        figure.savefig(png, transparent=transparent, dpi=120)
    return png.getvalue()


def _data_uri(title: str, draw: Draw) -> str:
    png = _picture({title: draw}, (5.2, 3.0), transparent=True)
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
