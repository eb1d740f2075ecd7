"""The configurations of runs side by side."""

import json
from collections.abc import Sequence
from typing import Any

from megatron_espo.report.runs import RunData


def settings_table(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Rows ``{key, values, differs, changed, help}``: every setting of any run, those that differ between runs first, then those that are not the default."""
    defaults = _defaults()
    rows = []
    for section, key in dict.fromkeys((s, k) for run in runs for s, keys in run.config.items() if isinstance(keys, dict) for k in keys):
        values = [_as_text(run.setting(section, key)) if key in run.config.get(section, {}) else "–" for run in runs]
        default, help_text = defaults.get((section, key), (None, ""))
        rows.append(
            {
                "key": f"{section}.{key}",
                "values": values,
                "differs": len(set(values)) > 1,
                "changed": any(value not in (default, "–") for value in values),
                "help": help_text,
            }
        )
    return sorted(rows, key=lambda row: (not row["differs"], not row["changed"]))


def _defaults() -> dict[tuple[str, str], tuple[str | None, str]]:
    """Default (``None`` where one must be given) and description of each setting."""
    from megatron_espo.config.reference import sections

    found = {}
    for section, model in sections().items():
        for key, field in model.model_fields.items():
            default = None if field.is_required() else _as_text(field.get_default(call_default_factory=True))
            found[section, key] = (default, field.description or "")
    return found


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
