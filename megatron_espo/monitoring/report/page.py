"""One self-contained HTML page about one or several runs."""

import json
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2  # torch requires it

from megatron_espo.config.reference import sections
from megatron_espo.monitoring.report.charts import COLORS, draw_sections
from megatron_espo.monitoring.report.runs import NOT_GIVEN, RunData, read_runs

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
    runs = read_runs(folders)
    first = runs[0].folder
    default = first / "report.html" if len(runs) == 1 else first.parent / "comparison.html"
    page = Path(out or default)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = number
    template = Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    text = environment.from_string(template).render(
        runs=runs,
        colors=COLORS,
        slice=slice,
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        sections=draw_sections(runs),
        settings=settings_table(runs),
        samples=[(run, sample_steps(run)) for run in runs if run.samples],
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
    return page


def number(value: Any) -> str:
    """Format a number for a table: an exponent only for very small or large values, a dash for
    none.
    """
    if not isinstance(value, int | float) or math.isnan(value):
        return NOT_GIVEN
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.1f}"


def settings_table(runs: Sequence[RunData]) -> list[tuple[str, list[str], bool]]:
    """Settings that are not the default in some run: name, value of each run, and whether these
    differ. Those that differ come first.
    """
    rows = []
    for section, model in sections().items():
        for key, field in model.model_fields.items():
            values = [_as_text(run.setting(section, key)) for run in runs]
            default = _as_text(field.get_default(call_default_factory=True))
            if {*values} - {default, NOT_GIVEN}:
                rows.append((f"{section}.{key}", values, len({*values}) > 1))
    return sorted(rows, key=lambda row: not row[2])


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def sample_steps(run: RunData) -> list[dict[str, Any]]:
    """A run's samples by step, each token with its entropy in percent of the highest one."""
    samples = [sample for found in run.samples.values() for sample in found]
    highest = max((e for sample in samples for e in sample["entropies"] or [] if e), default=1.0)
    return [
        {"step": step, "samples": [_shown(s, highest) for s in found[:SAMPLES_A_STEP]]}
        for step, found in run.samples.items()
    ]


def _shown(sample: dict[str, Any], highest: float) -> dict[str, Any]:
    pieces = sample["pieces"][:SAMPLE_TOKENS]
    # Entropy and group are None for tokens that the policy did not sample and for untrained
    # responses.
    untrained = [None] * len(pieces)
    entropies, groups = sample["entropies"] or untrained, sample["groups"] or untrained
    top = max(filter(None, groups), default=None)
    shown = [
        {
            # Make tokens without text (end of sequence, part of a character) and line breaks
            # visible.
            "text": piece.replace("\n", "⏎\n") or "▫",
            "title": f"token {number}" if entropy is None else f"{entropy:.2f} nats, group {group}",
            "heat": round(100 * (entropy or 0) / highest),
            "top": group is not None and group == top,
        }
        for piece, number, entropy, group in zip(
            pieces, sample["tokens"], entropies, groups, strict=False
        )
    ]
    return sample | {"shown": shown, "cut": len(sample["pieces"]) - len(shown)}
