"""Reads a run's folder: metrics by name, settings, samples and problems."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from megatron_espo.errors import InputError
from megatron_espo.files import read_json, read_jsonl
from megatron_espo.monitoring.throughput import PARTS, describe, performance

# A mean |engine - trainer| log-prob gap above this, in nats per token, is a warning.
LARGE_GAP = 0.05
# The last line of a Python traceback, with or without vLLM's prefix.
_EXCEPTION = re.compile(
    r"(?:^|\] )((?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Timeout)\b.*)$",
    re.MULTILINE,
)
_STEP = re.compile(r'{"step": (\d+),')
_MOST_EXCEPTIONS = 12
_BAD_IF_POSITIVE = {
    "sync/restarts": "restarts of the rollout engine during weight updates: {:g}",
    "optimizer/skipped": "updates skipped (a gradient was not finite, or a spike; bad_batches/)",
    "reward/failed": "responses not judged (the verifier crashed, hung, returned no number): {:g}",
}
_STOPPED = {"failed": "failed", "requeue": "was asked to stop"}
SAMPLE_STEPS = 6
NOT_GIVEN = "–"


def write_summary(
    folder: str | Path, seconds: float, seed: int, checkpoint_s: float = 0.0
) -> dict[str, Any]:
    """Write ``summary.json``: mean reward of the first and last three steps, steps, seconds of the
    run, seed, and ``performance``. For ``checkpoint_s`` see :func:`performance`.
    """
    lines = read_jsonl(Path(folder, "metrics.jsonl"))
    rewards = [line["reward/mean"] for line in lines]
    means = {"reward_first3": fmean(rewards[:3]), "reward_last3": fmean(rewards[-3:])}
    summary = means | {"steps": len(rewards), "seconds": round(seconds, 1), "seed": seed}
    found = summary | {"performance": performance(lines, checkpoint_s)}
    Path(folder, "summary.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


class RunData:
    """What a report shows of one run.

    Args:
        folder: of the run.
        name: unique among the runs of a report.

    Attributes:
        lines: ``metrics.jsonl`` by step; of a repeated step the last line.
        config, summary, status: ``config.json``, ``summary.json``, ``status.json``; ``{}`` if there
            is none.
        samples: lines of ``samples.jsonl`` by step, of ``SAMPLE_STEPS`` steps spread evenly.
        entropies: lines of ``entropy.jsonl``.
        engine_exceptions: last lines of tracebacks in the engines' logs, with the name of the log,
            and their number.
        model: name of the model's folder.
        performance: lines of text: seconds by phase, tokens per second, MFU.

    Raises:
        InputError: no such folder, or no finished step in it.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        records = read_jsonl(folder / "metrics.jsonl")
        lines = {line["step"]: line for line in records}
        if not lines:
            raise InputError(
                f"{folder}: expected a run's folder with at least one step in metrics.jsonl, "
                "found none"
            )
        self.lines: list[dict[str, Any]] = [lines[step] for step in sorted(lines)]
        for line in self.lines:
            if error := line.get("reward/standard_error"):
                line["reward/mean_low"] = line["reward/mean"] - error
                line["reward/mean_high"] = line["reward/mean"] + error
        self.config = read_json(folder / "config.json")
        self.summary = read_json(folder / "summary.json")
        self.status = read_json(folder / "status.json")
        self.samples = _read_samples(folder / "samples.jsonl", sorted(lines))
        self.entropies = read_jsonl(folder / "entropy.jsonl")
        self.engine_exceptions = Counter(
            f"{log.name}: {text[:300]}"
            for log in sorted(folder.glob("engine*.log"))
            for text in _EXCEPTION.findall(log.read_text(encoding="utf-8", errors="replace"))
        )
        self.model = Path(self.setting("model", "path")).name
        if self.summary.get("steps") != len(records):  # it is of an earlier part of the run
            self.summary = {}
        self.performance = describe(self.summary.get("performance") or performance(self.lines))

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps that report ``metric``, and its values."""
        lines = [line for line in self.lines if metric in line]
        return [line["step"] for line in lines], [line[metric] for line in lines]

    def names(self, pattern: str) -> list[str]:
        """Metrics whose whole name matches, in order of appearance."""
        names = dict.fromkeys(name for line in self.lines for name in line)
        return [name for name in names if re.fullmatch(pattern, name)]

    def mean(self, metric: str) -> float:
        """Over the steps that report it; NaN without any."""
        values = self.series(metric)[1]
        return fmean(values) if values else math.nan

    def setting(self, section: str, key: str) -> Any:
        """A value of ``config.json``, or ``NOT_GIVEN``."""
        return self.config.get(section, {}).get(key, NOT_GIVEN)

    @property
    def phases(self) -> list[str]:
        """Phases of a step, without those that are part of another phase."""
        names = [name[5:-2] for name in self.names("time/.*")]
        return [name for name in names if name not in ("step", "score", *PARTS)]

    def problems(self) -> list[str]:
        """Problems of the run, worst first."""
        found, steps, state = [], [line["step"] for line in self.lines], self.status.get("state")
        if state in _STOPPED:
            found.append(f"the run {_STOPPED[state]} after step {steps[-1]}: {self.status['why']}")
        elif not self.summary:
            done = f"{steps[-1]} of {self.setting('run', 'steps')} steps"
            found.append(f"the run had not finished when this was written ({done})")
        if missing := sorted(set(range(1, steps[-1])) - set(steps)):
            found.append(f"no metrics of {len(missing)} steps: {_some(missing)}")
        for name in self.names(".+/.+"):
            if broken := [step for step, value in self._points(name) if not math.isfinite(value)]:
                found.append(f"{name} is NaN or infinite in steps {_some(broken)}")
        for metric, what in _BAD_IF_POSITIVE.items():
            if bad := {step: value for step, value in self._points(metric) if value}:
                found.append(f"{what.format(sum(bad.values()))}, in steps {_some(list(bad))}")
        gaps = self._points("mismatch/logprob_gap_mean")
        if large := [step for step, gap in gaps if not gap <= LARGE_GAP]:
            limit = f"{LARGE_GAP:g} nats a token"
            found.append(f"engine and trainer differ by more than {limit} in steps {_some(large)}")
        for text, count in self.engine_exceptions.most_common(_MOST_EXCEPTIONS):
            found.append(text + (f" ({count} times)" if count > 1 else ""))
        return found

    def _points(self, metric: str) -> Iterable[tuple[int, float]]:
        return zip(*self.series(metric), strict=True)


def read_runs(folders: Sequence[str | Path]) -> list[RunData]:
    """Read the runs in ``folders``.

    Raises:
        InputError: no such folder, or no finished step in it.
    """
    names = [Path(folder).resolve().name for folder in folders]
    return [
        RunData(Path(folder), name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def _read_samples(path: Path, steps: list[int]) -> dict[int, list[dict[str, Any]]]:
    """Samples of a few of the run's steps. Parses only their lines: the file of a long run has
    hundreds of MB.
    """
    places = np.linspace(0, len(steps) - 1, SAMPLE_STEPS).round().astype(int)
    chosen: dict[int, list[dict[str, Any]]] = {steps[place]: [] for place in places}
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            for line in file:
                step = _STEP.match(line)
                if step and int(step[1]) in chosen and line.endswith("\n"):
                    chosen[int(step[1])].append(json.loads(line))
    return {step: samples for step, samples in chosen.items() if samples}


def _some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown + (f", ... ({len(numbers)} in all)" if len(numbers) > 8 else "")
