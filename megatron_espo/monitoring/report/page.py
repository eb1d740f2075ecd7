"""One self-contained HTML page about one or several runs."""

import json
import math
from collections.abc import Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from megatron_espo.config.reference import sections
from megatron_espo.monitoring.report.charts import COLORS, draw_sections
from megatron_espo.monitoring.report.runs import RunData, read_runs
from megatron_espo.monitoring.throughput import describe, performance

# The page shows only the first tokens of long samples, so that it stays below 3 MB.
SAMPLE_TOKENS, SAMPLES_A_STEP = 800, 4


def write_report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the page about the runs in ``folders``; returns its path.

    Args:
        folders: of the runs.
        out: path of the page; ``None``: ``report.html`` in the folder of a single run, or
            ``comparison.html`` beside the first of several.

    Raises:
        InputError: a folder without metrics.
    """
    import jinja2  # torch requires it

    runs = read_runs(folders)
    first = runs[0].folder
    default = first / "report.html" if len(runs) == 1 else first.parent / "comparison.html"
    page = Path(out or default)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = number
    source = files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    text = environment.from_string(source).render(
        runs=[overview(run, i) for i, run in enumerate(runs)],
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        sections=draw_sections(runs),
        settings=settings_table(runs),
        samples=[(run, sample_steps(run)) for run in runs if run.samples],
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
    return page


def number(value: Any, digits: int = 3) -> str:
    """Format a number for a table: significant digits, an exponent only for very small or large
    values, a dash for none.
    """
    if not isinstance(value, int | float) or math.isnan(value):
        return "–"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits - 1}e}"
    decimals = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, min(decimals, digits))}f}"


def overview(run: RunData, position: int) -> dict[str, Any]:
    """A run's entry at the top of the page, and its problems."""
    rewards = run.series("reward/mean")[1] or [math.nan]
    evaluations = []
    for name in run.names(r"eval/avg@\d+"):
        low, high = ((run.series(name + end)[1] or [math.nan])[-1] for end in ("_low", "_high"))
        values = run.series(name)[1]
        entry = {"name": name.removeprefix("eval/"), "first": values[0], "last": values[-1]}
        evaluations.append(entry | {"low": low, "high": high})
    return {
        "name": run.name,
        "color": COLORS[position % len(COLORS)],
        "folder": str(run.folder),
        "model": Path(str(run.setting("model", "path") or "?")).name,
        "objective": run.setting("algorithm", "objective") or "?",
        "steps": run.lines[-1]["step"],
        "of": run.setting("run", "steps"),
        "finished": bool(run.summary),
        "reward_first": sum(rewards[:3]) / len(rewards[:3]),
        "reward_last": sum(rewards[-3:]) / len(rewards[-3:]),
        "evaluations": evaluations,
        "step_s": run.mean("time/step_s"),
        "tokens_per_s": run.mean("throughput/response_tokens_per_s"),
        "gap": run.mean("mismatch/logprob_gap_mean"),
        "seconds": run.summary.get("seconds"),
        "performance": describe(run.summary.get("performance") or performance(run.lines)),
        "status": run.status,
        "problems": run.problems(),
    }


def settings_table(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Settings of all runs: ``{key, values, differs, changed, help}``, those that differ between
    runs first, then non-defaults.
    """
    known = {(s, key): f for s, m in sections().items() for key, f in m.model_fields.items()}
    settings = dict.fromkeys(
        (s, key) for run in runs for s, keys in run.config.items() for key in keys
    )
    rows = []
    for section, key in settings:
        have = [key in run.config.get(section, {}) for run in runs]
        values = [
            _as_text(run.setting(section, key)) if has else "–"
            for run, has in zip(runs, have, strict=True)
        ]
        field, default = known.get((section, key)), None
        if field and not field.is_required():
            default = _as_text(field.get_default(call_default_factory=True))
        rows.append(
            {
                "key": f"{section}.{key}",
                "values": values,
                "differs": len(set(values)) > 1,
                "changed": any(value not in (default, "–") for value in values),
                "help": field.description or "" if field else "",
            }
        )
    return sorted(rows, key=lambda row: (not row["differs"], not row["changed"]))


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def sample_steps(run: RunData) -> list[dict[str, Any]]:
    """A run's samples by step, each token with its entropy in percent of the highest one."""
    samples = [sample for found in run.samples.values() for sample in found]
    entropies = [e for sample in samples for e in sample["entropies"] or [] if e is not None]
    highest = max(entropies, default=0.0) or 1.0
    return [
        {"step": step, "samples": [_shown(s, highest) for s in found[:SAMPLES_A_STEP]]}
        for step, found in run.samples.items()
    ]


def _shown(sample: dict[str, Any], highest: float) -> dict[str, Any]:
    # Entropy and group are null for tokens that the policy did not sample, and for untrained
    # responses.
    pieces, untrained = sample["pieces"], [None] * len(sample["pieces"])
    entropies, groups = sample["entropies"] or untrained, sample["groups"] or untrained
    top = max((group for group in groups if group is not None), default=0)
    tokens = []
    for i, piece in enumerate(pieces[:SAMPLE_TOKENS]):
        entropy, title = entropies[i], f"token {sample['tokens'][i]}"
        token = {"heat": 0, "top": top > 0 and groups[i] == top}
        if entropy is not None:
            title = f"{entropy:.2f} nats, group {groups[i]}"
            token["heat"] = round(100 * entropy / highest)
        # Make tokens without text (end of sequence, part of a character) and line breaks visible.
        text = piece.replace("\n", "⏎\n") if piece else "▫"
        tokens.append(token | {"text": text, "title": title})
    return sample | {"shown": tokens, "cut": len(pieces) - len(tokens)}
