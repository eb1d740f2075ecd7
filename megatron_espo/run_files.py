"""The files of a run's folder, read and written without torch."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Lines of a JSONL file; of a line that is just being written, and of an absent file, nothing."""
    if not Path(path).is_file():
        return []
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_json(path: str | Path) -> dict[str, Any]:
    """An object in JSON; ``{}`` for an absent file and for one that holds no JSON object (half written)."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_durably(path: Path, text: str) -> None:
    """Replace a file at once: after a crash it holds the old text or the new, never a part."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
    make_durable(path.parent)


def make_durable(*paths: Path) -> None:
    """Flush files and folders to the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def keep_steps(path: Path, last_step: int) -> None:
    """Drop the lines of a JSONL file that belong to steps after ``last_step``: a run that goes on from there writes them anew."""
    if path.is_file():
        kept = [line for line in read_jsonl(path) if line["step"] <= last_step]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def phase_names(metrics: Iterable[str]) -> list[str]:
    """Phases of a step among metrics' names, in their order; not ``step``, and not what is part of another phase."""
    names = dict.fromkeys(name[5:-2] for name in metrics if name.startswith("time/"))
    return [name for name in names if name not in ("step", "verify", "canary")]
