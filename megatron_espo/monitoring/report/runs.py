"""Reads a run's folder: metrics by name, settings, samples and problems."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_espo.errors import InputError
from megatron_espo.files import read_json, read_jsonl
from megatron_espo.monitoring.throughput import describe, performance

# A mean |engine - trainer| log-prob gap above this, in nats per token, is a warning.
LARGE_GAP = 0.05
# The last line of a Python traceback, with or without vLLM's prefix.
_EXCEPTION = re.compile(
    r"(?:^|\] )((?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Exit|Timeout)\b.*)$"
)
_STEP = re.compile(r'{"step": (\d+),')
_MOST_EXCEPTIONS = 12
_BAD_IF_POSITIVE = {
    "sync/restarts": "restarts of the rollout engine during weight updates",
    "optimizer/skipped": "updates skipped (a gradient was not finite, or a spike; bad_batches/)",
    "reward/failed": "responses not judged (the verifier crashed, hung or returned no number)",
}
SAMPLE_STEPS = 6
NOT_GIVEN = "–"


def write_summary(
    folder: str | Path, *, seconds: float, seed: int, after_last: dict[str, float] | None = None
) -> dict[str, Any]:
    """Write ``summary.json``: mean reward of the first and last three steps, steps, seconds of the
    run, seed, and ``performance``. For ``after_last`` see :func:`performance`.
    """
    lines = read_jsonl(Path(folder, "metrics.jsonl"))
    rewards = [line["reward/mean"] for line in lines]
    means = {"reward_first3": fmean(rewards[:3]), "reward_last3": fmean(rewards[-3:])}
    summary = means | {"steps": len(rewards), "seconds": round(seconds, 1), "seed": seed}
    found = summary | {"performance": performance(lines, after_last)}
    Path(folder, "summary.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


@dataclass(frozen=True)
class RunData:
    """What a report shows of one run.

    Attributes:
        folder: of the run.
        name: unique among the runs of a report.
        lines: ``metrics.jsonl`` by step; of a repeated step the last line.
        config, summary, status: ``config.json``, ``summary.json``, ``status.json``; ``{}`` if there
            is none.
        samples: lines of ``samples.jsonl`` by step, of ``SAMPLE_STEPS`` steps spread evenly.
        entropies: lines of ``entropy.jsonl``.
        engine_exceptions: last lines of tracebacks in ``engine.log``, with their number.
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
        lines = [line for line in self.lines if metric in line]
        return [line["step"] for line in lines], [line[metric] for line in lines]

    def names(self, pattern: str) -> list[str]:
        """Metrics whose whole name matches, in order of appearance."""
        names = dict.fromkeys(name for line in self.lines for name in line)
        return [name for name in names if re.fullmatch(pattern, name)]

    def mean(self, metric: str) -> float:
        """Over the steps that report it; NaN without any."""
        values = [value for value in self.series(metric)[1] if math.isfinite(value)]
        return fmean(values) if values else math.nan

    def setting(self, section: str, key: str) -> Any:
        """A value of ``config.json``, or ``NOT_GIVEN``."""
        return self.config.get(section, {}).get(key, NOT_GIVEN)

    @property
    def model(self) -> str:
        """Name of the model's folder."""
        return Path(self.setting("model", "path")).name

    @property
    def phases(self) -> list[str]:
        """Phases of a step, without those that are part of another phase."""
        names = [name[5:-2] for name in self.names("time/.*")]
        return [name for name in names if name not in ("step", "score", "verify", "canary")]

    def performance(self) -> list[str]:
        """Lines of text: seconds by phase, tokens per second, MFU."""
        return describe(self.summary.get("performance") or performance(self.lines))

    def problems(self) -> list[str]:
        """Problems of the run, worst first."""
        return [
            *self._end_problems(),
            *self._metric_problems(),
            *(
                f"engine.log: {line[:300]}" + (f" ({count} times)" if count > 1 else "")
                for line, count in self.engine_exceptions.most_common(_MOST_EXCEPTIONS)
            ),
        ]

    def _end_problems(self) -> Iterator[str]:
        last, state, why = self.lines[-1]["step"], self.status.get("state"), self.status.get("why")
        if state == "failed":
            yield f"the run failed after step {last}: {why}"
        elif state == "requeue":
            yield f"the run was asked to stop after step {last}: {why}"
        elif not self.summary:
            steps = self.setting("run", "steps")
            yield f"the run had not finished when this was written ({last} of {steps} steps)"

    def _metric_problems(self) -> Iterator[str]:
        """Problems in ``metrics.jsonl``, with their steps."""
        steps = {line["step"] for line in self.lines}
        if missing := sorted(set(range(1, max(steps) + 1)) - steps):
            yield f"no metrics of {len(missing)} steps: {_some(missing)}"
        for name in self.names(r".+/.+"):
            if broken := self.steps_where(name, lambda value: not math.isfinite(value)):
                yield f"{name} is NaN or infinite in steps {_some(broken)}"
        for metric, what in _BAD_IF_POSITIVE.items():
            if steps_with := self.steps_where(metric, bool):
                total = sum(self.series(metric)[1])
                yield f"{what}: {total:g}, in steps {_some(steps_with)}"
        if gaps := self.steps_where("mismatch/logprob_gap_mean", lambda gap: not gap <= LARGE_GAP):
            limit = f"{LARGE_GAP:g} nats a token"
            yield f"engine and trainer differ by more than {limit} in steps {_some(gaps)}"

    def steps_where(self, metric: str, test: Callable[[float], bool]) -> list[int]:
        """Steps whose value of ``metric`` passes ``test``."""
        return [step for step, value in zip(*self.series(metric), strict=True) if test(value)]


def read_runs(folders: Sequence[str | Path]) -> list[RunData]:
    """Read the runs in ``folders``.

    Raises:
        InputError: no such folder, or no finished step in it.
    """
    runs: list[RunData] = []
    for folder in map(Path, folders):
        lines = {line["step"]: line for line in read_jsonl(folder / "metrics.jsonl")}
        if not lines:
            raise InputError(
                f"{folder}: expected a run's folder with at least one step in metrics.jsonl, "
                "found none"
            )
        for line in lines.values():
            if error := line.get("reward/standard_error"):
                for end, sign in (("_low", -1), ("_high", 1)):
                    line[f"reward/mean{end}"] = line["reward/mean"] + sign * error
        steps, name = sorted(lines), folder.resolve().name
        is_taken = any(run.name == name for run in runs)
        runs.append(
            RunData(
                folder=folder,
                name=str(folder) if is_taken else name,
                lines=[lines[step] for step in steps],
                config=read_json(folder / "config.json"),
                summary=read_json(folder / "summary.json"),
                status=read_json(folder / "status.json"),
                samples=_read_samples(folder / "samples.jsonl", steps),
                entropies=read_jsonl(folder / "entropy.jsonl"),
                engine_exceptions=_exceptions(folder / "engine.log"),
            )
        )
    return runs


def _read_samples(path: Path, steps: list[int]) -> dict[int, list[dict[str, Any]]]:
    """Samples of a few of the run's steps. Parses only their lines: the file of a long run has
    hundreds of MB.
    """
    last, parts = len(steps) - 1, SAMPLE_STEPS - 1
    chosen: dict[int, list] = {steps[round(i * last / parts)]: [] for i in range(parts + 1)}
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            for line in file:
                step = _STEP.match(line)
                if step and int(step[1]) in chosen and line.endswith("\n"):
                    chosen[int(step[1])].append(json.loads(line))
    return {step: samples for step, samples in chosen.items() if samples}


def _exceptions(log: Path) -> Counter[str]:
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    matches = map(_EXCEPTION.search, text.splitlines())
    return Counter(match.group(1) for match in matches if match)


def _some(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown + (f", ... ({len(numbers)} in all)" if len(numbers) > 8 else "")
