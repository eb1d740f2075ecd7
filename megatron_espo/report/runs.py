"""A run's folder, read: metrics by name, settings, samples, and what went wrong."""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_espo.errors import InputError
from megatron_espo.run_files import phase_names, read_json, read_jsonl

# The end of a Python traceback, with or without vLLM's prefix.
_EXCEPTION = re.compile(r"(?:^|\] )((?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Timeout)\b.*)$")
_STEP = re.compile(r'{"step": (\d+),')
_MOST_PROBLEMS = 12
SAMPLE_STEPS = 6


@dataclass(frozen=True)
class RunData:
    """What a report shows of one run.

    Attributes:
        folder: of the run.
        name: unique among the runs of a report.
        lines: ``metrics.jsonl`` by step; of a step that was repeated after a restart, the last line.
        config, summary, status: ``config.json``, ``summary.json``, ``status.json``; ``{}`` where there is none.
        samples: lines of ``samples.jsonl`` by step, of ``SAMPLE_STEPS`` steps spread evenly over those with trained samples.
        entropies: lines of ``entropy.jsonl``.
        engine_exceptions: last lines of tracebacks in ``engine.log``, with how often each was there.
    """

    folder: Path
    name: str
    lines: list[dict[str, Any]]
    config: dict[str, Any]
    summary: dict[str, Any]
    status: dict[str, Any]
    samples: dict[int, list[dict[str, Any]]]
    entropies: list[dict[str, Any]]
    engine_exceptions: Counter[str]

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps that report ``metric``, and its values."""
        found = [(line["step"], line[metric]) for line in self.lines if isinstance(line.get(metric), int | float)]
        return [step for step, _ in found], [float(value) for _, value in found]

    def names(self, pattern: str) -> list[str]:
        """Metrics whose whole name matches, in order of appearance."""
        return [name for name in dict.fromkeys(name for line in self.lines for name in line) if re.fullmatch(pattern, name)]

    def mean(self, metric: str) -> float:
        """Over the steps that report it; NaN without any."""
        values = [value for value in self.series(metric)[1] if math.isfinite(value)]
        return fmean(values) if values else math.nan

    def setting(self, section: str, key: str) -> Any:
        """A value of ``config.json``; ``None`` where there is none."""
        return self.config.get(section, {}).get(key)

    @property
    def phases(self) -> list[str]:
        """Names of the phases of a step, without ``step``."""
        return phase_names(name for line in self.lines for name in line)

    def problems(self) -> list[str]:
        """What a reader should know before believing the curves, worst first."""
        found, last, steps = [], self.lines[-1]["step"], self.setting("run", "steps")
        state = self.status.get("state")
        if state in ("failed", "requeue"):
            found.append(f"the run {'failed' if state == 'failed' else 'was asked to stop'} after step {last}: {self.status.get('why')}")
        elif not self.summary:
            found.append(f"the run had not finished when this was written ({last} of {steps or '?'} steps)")
        restarts = {step: count for step, count in zip(*self.series("sync/restarts"), strict=True) if count}
        if restarts:
            found.append(f"the rollout engine was restarted {sum(restarts.values()):.0f} times, at the syncs of steps {_some(sorted(restarts))}")
        missing = sorted(set(range(1, last + 1)) - {line["step"] for line in self.lines})
        if missing:
            found.append(f"no metrics of {len(missing)} steps: {_some(missing)}")
        broken = [name for name in self.names(r".+/.+") if not all(map(math.isfinite, self.series(name)[1]))]
        if broken:
            found.append(f"NaN or infinity in {', '.join(broken)}")
        skipped = [step for step, share in zip(*self.series("optimizer/skipped"), strict=True) if share]
        if skipped:
            found.append(f"updates were skipped in steps {_some(skipped)}, because a gradient was not finite (bad_batches/)")
        failed = sum(self.series("reward/failed")[1])
        if failed:
            found.append(f"{failed:.0f} responses were not judged: the verifier crashed, hung or returned no number")
        limit = self.setting("rollout", "log_prob_gap_warn") or math.inf
        above = [step for step, gap in zip(*self.series("mismatch/logprob_gap_mean"), strict=True) if not gap <= limit]
        if above:
            found.append(f"engine and trainer differ by more than {limit:g} nats a token (rollout.log_prob_gap_warn) in steps {_some(above)}")
        for line, count in self.engine_exceptions.most_common(_MOST_PROBLEMS):
            found.append(f"engine.log: {line[:300]}" + (f" ({count} times)" if count > 1 else ""))
        return found


def read_runs(folders: Sequence[str | Path]) -> list[RunData]:
    """The runs in ``folders``.

    Raises:
        InputError: no such folder, or no finished step in it.
    """
    names: Counter[str] = Counter()
    runs = []
    for folder in map(Path, folders):
        lines = list({line["step"]: line for line in read_jsonl(folder / "metrics.jsonl")}.values())
        if not lines:
            raise InputError(f"{folder}: expected a run's folder with at least one step in metrics.jsonl, found none")
        config = read_json(folder / "config.json")
        name = config.get("run", {}).get("name") or folder.resolve().name
        names[name] += 1
        runs.append(
            RunData(
                folder=folder,
                name=name if names[name] == 1 else f"{name} ({names[name]})",
                lines=sorted(lines, key=lambda line: line["step"]),
                config=config,
                summary=read_json(folder / "summary.json"),
                status=read_json(folder / "status.json"),
                samples=_read_samples(folder / "samples.jsonl"),
                entropies=read_jsonl(folder / "entropy.jsonl"),
                engine_exceptions=_exceptions(folder / "engine.log"),
            )
        )
    return runs


def _read_samples(path: Path) -> dict[int, list[dict[str, Any]]]:
    """A long run's file has hundreds of MB: only the lines that are shown are kept and parsed."""
    if not path.is_file():
        return {}
    trained: dict[int, bool] = {}
    with path.open(encoding="utf-8") as file:
        for line in file:
            if match := _STEP.match(line):
                step = int(match[1])
                trained[step] = trained.get(step, False) or not line.endswith('"groups": null}\n')
    steps = sorted(step for step, found in trained.items() if found) or sorted(trained)
    count = min(SAMPLE_STEPS, len(steps))
    chosen = {steps[round(i * (len(steps) - 1) / max(1, count - 1))]: [] for i in range(count)}
    with path.open(encoding="utf-8") as file:
        for line in file:
            if (match := _STEP.match(line)) and int(match[1]) in chosen and line.endswith("\n"):
                chosen[int(match[1])].append(json.loads(line))
    return chosen


def _exceptions(log: Path) -> Counter[str]:
    if not log.is_file():
        return Counter()
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return Counter(match.group(1) for line in lines if (match := _EXCEPTION.search(line)))


def _some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown + (f", ... ({len(numbers)} in all)" if len(numbers) > 8 else "")
