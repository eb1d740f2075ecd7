"""A run on one screen of a terminal, while it goes."""

import json
import math
import re
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megatron_espo.errors import InputError
from megatron_espo.report.numbers import number
from megatron_espo.run_files import last_line, phase_names, read_json

ENDS = ("done", "failed", "requeue")
_BARS = "▁▂▃▄▅▆▇█"
_COLORS = ("blue", "yellow", "green", "magenta", "cyan", "red", "white")
# Name on the screen and metric; those that the run does not report are left out.
ROWS = (
    ("reward", r"reward/mean"),
    ("avg@k, held out", r"eval/avg@\d+"),
    ("pass@k, held out", r"eval/pass@(?!1$)\d+"),
    ("response length", r"rollout/length_mean"),
    ("truncated", r"rollout/truncated"),
    ("with advantage", r"rollout/with_advantage"),
    ("entropy, lowest group", r"group0/entropy"),
    ("entropy, highest group", r"group\d+/entropy"),
    ("clipped, no gradient", r"policy/no_gradient"),
    ("log-prob gap (nats)", r"mismatch/logprob_gap_mean"),
    ("gradient norm", r"optimizer/grad_norm"),
    ("response tokens / s", r"throughput/response_tokens_per_s"),
    ("trained tokens / s", r"throughput/trained_tokens_per_s"),
    ("seconds a step", r"time/step_s"),
    ("memory (GiB)", r"system/rss_gib"),
)


class RunView:
    """What the screen shows of a run's folder; ``refresh`` reads what is new.

    Raises:
        InputError: no such folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"{folder}: expected a run's folder, found none")
        self.config: dict[str, Any] = {}
        self.status: dict[str, Any] = {}
        self.lines: list[dict[str, Any]] = []
        self._offset, self._unread = 0, b""

    def refresh(self) -> None:
        """Read new lines of ``metrics.jsonl``, and the small files again."""
        # A file that is just being written reads as empty.
        self.config = read_json(self.folder / "config.json") or self.config
        self.status = read_json(self.folder / "status.json") or self.status
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return
        if path.stat().st_size < self._offset:  # a run that went on took steps back
            self.lines, self._offset, self._unread = [], 0, b""
        with path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        self._offset += len(data)
        *complete, self._unread = (self._unread + data).split(b"\n")
        self.lines += map(json.loads, complete)

    @property
    def state(self) -> str:
        """Of ``status.json``; without one, ``done`` where there is a summary and ``running`` otherwise."""
        return self.status.get("state") or ("done" if (self.folder / "summary.json").is_file() else "running")

    def series(self, pattern: str) -> list[float]:
        """Values of the last metric whose name matches."""
        names = sorted({name for line in self.lines for name in line if re.fullmatch(pattern, name)})
        return [line[names[-1]] for line in self.lines if names[-1] in line] if names else []

    def render(self, width: int = 100) -> Group:
        """The screen."""
        return Group(*self._head(width), *([self._table(width), *self._phases(width)] if self.lines else []), *self._sample(width), *self._warnings())

    def _head(self, width: int) -> list[Any]:
        run = self.config.get("run", {})
        step, steps = (self.lines[-1]["step"] if self.lines else 0), run.get("steps") or 0
        objective, model = self.config.get("algorithm", {}).get("objective", "?"), self.config.get("model", {}).get("path", "?")
        color = {"running": "green", "done": "blue", "failed": "red", "requeue": "yellow"}.get(self.state, "white")
        title = Text.assemble((run.get("name") or self.folder.resolve().name, "bold"), f"  {objective.upper()} on {Path(model).name}  ", (self.state, f"bold {color}"))
        seconds = [line["time/step_s"] for line in self.lines[-20:] if "time/step_s" in line]
        left = f", about {_duration((steps - step) * sum(seconds) / len(seconds))} left" if seconds and self.state == "running" else ""
        news = f"last step {_duration(time.time() - (self.folder / 'metrics.jsonl').stat().st_mtime)} ago" if self.lines else "waiting for the first step"
        done = round(width * min(1.0, step / steps)) if steps else 0
        bar = Text("━" * done, color) + Text("━" * (width - done), "dim")
        return [title, bar, Text(f"step {step} of {steps or '?'}, {news}{left}", "dim"), ""]

    def _table(self, width: int) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for name, side in (("", "left"), ("now", "right"), ("first", "right"), ("highest", "right"), ("over steps", "left")):
            table.add_column(name, justify=side, no_wrap=True)
        for name, pattern in ROWS:
            values = self.series(pattern)
            if values:
                finite = [value for value in values if math.isfinite(value)] or [math.nan]
                table.add_row(name, Text(number(values[-1]), "bold"), number(values[0]), number(max(finite)), sparkline(values, max(8, width - 62)))
        return table

    def _phases(self, width: int) -> list[Any]:
        """The last step's seconds by phase as one bar."""
        line = self.lines[-1]
        seconds = {name: line[f"time/{name}_s"] for name in phase_names(line)}
        total = sum(seconds.values()) or 1.0
        bar, legend = Text(), Text()
        for (name, value), color in zip(seconds.items(), _COLORS * 3, strict=False):
            bar.append(" " * round(width * value / total), f"on {color}")
            legend.append("■ ", color).append(f"{name} {value:.1f} s  ")
        return ["", bar, legend]

    def _sample(self, width: int) -> list[Any]:
        sample = last_line(self.folder / "samples.jsonl")
        return [Text(f"\nreward {number(sample['reward'])}: {sample['response'].strip()[: 3 * width]!r}", "dim")] if sample else []

    def _warnings(self) -> list[Any]:
        found = []
        if self.state in ("failed", "requeue"):
            found.append(f"{self.state}: {self.status.get('why')}")
        limit = self.config.get("rollout", {}).get("log_prob_gap_warn", math.inf)
        if (gaps := self.series(r"mismatch/logprob_gap_mean")) and not gaps[-1] <= limit:
            found.append(f"engine and trainer differ by {gaps[-1]:.3g} nats a token, above rollout.log_prob_gap_warn = {limit:g}")
        if skipped := sum(map(bool, self.series(r"optimizer/skipped"))):
            found.append(f"{skipped} steps had updates skipped, because a gradient was not finite")
        if failed := sum(self.series(r"reward/failed")):
            found.append(f"{failed:.0f} responses were not judged so far")
        if restarts := sum(self.series(r"sync/restarts")):
            found.append(f"the rollout engine was restarted {restarts:.0f} times")
        return [Text(text, "yellow") for text in found]


def sparkline(values: list[float], width: int) -> str:
    """The last values as bars, from the lowest of them to the highest; more than ``width`` are averaged over equal stretches."""
    size = -(-len(values) // width)
    means = [sum(part) / len(part) for i in range(0, len(values), size) if (part := values[i : i + size])]
    finite = [value for value in means if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] if math.isfinite(value) else "×" for value in means)


def tail(folder: str | Path, *, once: bool = False, every_s: float = 2.0) -> int:
    """Show the run until it ends or Ctrl-C; with ``once`` print the screen and leave. Returns 1 for a failed run, else 0.

    Raises:
        InputError: no such folder.
    """
    view, console = RunView(folder), Console()
    view.refresh()
    if not once:
        try:
            with Live(view.render(console.width), console=console, screen=True, auto_refresh=False) as live:
                while view.state not in ENDS:
                    time.sleep(every_s)
                    view.refresh()
                    live.update(view.render(console.width), refresh=True)
        except KeyboardInterrupt:
            pass
    console.print(view.render(console.width))
    return int(view.state == "failed")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
