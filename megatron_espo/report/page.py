"""One self-contained HTML page about one or several runs, and its pictures as PNG files."""

import math
from collections.abc import Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_espo.report.charts import draw_sections
from megatron_espo.report.drawing import COLORS, VARIABLES
from megatron_espo.report.runs import RunData, read_runs
from megatron_espo.report.settings import settings_table

# Of long samples only the beginning is shown: the page stays below 3 MB.
SAMPLE_TOKENS, SAMPLES_A_STEP = 800, 4


def write_report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the page about ``folders`` to ``out`` and its pictures as PNG into ``<out without ending>_pictures``; returns the page's path.

    ``out`` is ``report.html`` in the run's folder for one run, and ``comparison.html`` beside the first run for several.

    Raises:
        InputError: a folder without metrics.
    """
    import jinja2  # torch requires it

    runs = read_runs(folders)
    first = runs[0].folder
    page = Path(out) if out else (first / "report.html" if len(runs) == 1 else first.parent / "comparison.html")
    sections = draw_sections(runs)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["number"] = number
    template = environment.from_string(files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8"))
    text = template.render(
        runs=[overview(run, i) for i, run in enumerate(runs)],
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        sections=sections,
        settings=settings_table(runs),
        samples=[(run, sample_steps(run)) for run in runs if run.samples],
        colors=dict(zip(VARIABLES.values(), VARIABLES, strict=True)),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
    pictures = page.with_name(f"{page.stem}_pictures")
    pictures.mkdir(exist_ok=True)
    for section in sections:
        for picture in section.pictures:
            pictures.joinpath(f"{picture.name}.png").write_bytes(picture.png)
    return page


def number(value: Any, digits: int = 3) -> str:
    """A number for a table: so many significant digits, no exponent for everyday sizes, a dash for none."""
    if not isinstance(value, int | float) or math.isnan(value):
        return "–"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits - 1}e}"
    decimals = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, min(decimals, digits))}f}"


def overview(run: RunData, position: int) -> dict[str, Any]:
    """A run's line in the table at the top, and its problems."""
    rewards = run.series("reward/mean")[1]
    evaluated = [name for name in run.names(r"eval/avg@\d+") if run.series(name)[1]]
    return {
        "name": run.name,
        "color": f"var(--c{position % len(COLORS)})",
        "folder": str(run.folder),
        "model": Path(str(run.setting("model", "path") or "?")).name,
        "objective": run.setting("algorithm", "objective") or "?",
        "steps": run.lines[-1]["step"],
        "of": run.setting("run", "steps"),
        "finished": bool(run.summary),
        "reward_first": fmean(rewards[:3]) if rewards else math.nan,
        "reward_last": fmean(rewards[-3:]) if rewards else math.nan,
        "evaluations": [
            {
                "name": name.removeprefix("eval/"),
                "first": run.series(name)[1][0],
                "last": run.series(name)[1][-1],
                "low": (run.series(f"{name}_low")[1] or [math.nan])[-1],
                "high": (run.series(f"{name}_high")[1] or [math.nan])[-1],
            }
            for name in evaluated
        ],
        "step_s": run.mean("time/step_s"),
        "tokens_per_s": run.mean("throughput/response_tokens_per_s"),
        "gap": run.mean("mismatch/logprob_gap_mean"),
        "truncated": run.mean("rollout/truncated"),
        "seconds": run.summary.get("seconds"),
        "status": {key: value for key, value in run.status.items() if not isinstance(value, dict | list)},
        "problems": run.problems(),
    }


def sample_steps(run: RunData) -> list[dict[str, Any]]:
    """A run's samples by step, with the heat of each token from 0 to 100: its entropy over the highest one shown."""
    highest = max((e for samples in run.samples.values() for s in samples for e in s["entropies"] or [] if e is not None), default=0.0) or 1.0
    return [{"step": step, "samples": [_shown(s, highest) for s in samples[:SAMPLES_A_STEP]]} for step, samples in run.samples.items()]


def _shown(sample: dict[str, Any], highest: float) -> dict[str, Any]:
    # Entropy and group are null where the policy did not sample the token, and where the response was not trained.
    untrained = [None] * len(sample["pieces"])
    entropies, groups = sample["entropies"] or untrained, sample["groups"] or untrained
    top = max((group for group in groups if group is not None), default=0)
    tokens = []
    for i, piece in enumerate(sample["pieces"][:SAMPLE_TOKENS]):
        trained = entropies[i] is not None
        tokens.append(
            {
                # Tokens without text of their own (end of sequence, part of a character), and line breaks, must be seen too.
                "text": piece.replace("\n", "⏎\n") if piece else "▫",
                "heat": round(100 * entropies[i] / highest) if trained else 0,
                "top": top > 0 and groups[i] == top,
                "title": f"{entropies[i]:.2f} nats, group {groups[i]}" if trained else f"token {sample['tokens'][i]}",
            }
        )
    return sample | {"shown": tokens, "cut": len(sample["pieces"]) - len(tokens)}
