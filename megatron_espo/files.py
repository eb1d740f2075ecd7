"""Reads and writes files of a run. Does not import torch."""

import json
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_espo.errors import InputError


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file. Skips an incomplete last line. Empty if there is no file."""
    if not Path(path).is_file():
        return []
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file. InputError: it cannot be read, or has another content."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        got = f"a JSON {type(content).__name__}"
    except (OSError, ValueError) as error:
        content, got = None, f"{type(error).__name__} ({error})"
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {got}")
    return content


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object; ``{}`` if there is no file, or no valid JSON object in it."""
    with suppress(InputError):
        return read_object(path)
    return {}


def safetensors_header(file: Path) -> dict[str, dict[str, Any]]:
    """Return ``{tensor name: {"dtype", "shape", "data_offsets"}}`` of a safetensors file.

    The format: eight bytes (the header's length), the header, the tensors.

    Raises:
        InputError: unreadable, a Git LFS pointer, no header, or a length other than the header's.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            text = stream.read(length) if length < size else b""
    except OSError as error:
        raise InputError(f"expected a safetensors file, got {error}; fetch it again") from None
    if start == b"version ":
        raise InputError(
            f"expected weights in {file}, found a Git LFS pointer; run `git lfs pull` there"
        )
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"expected a safetensors header in {file}, found none; fetch it again"
        ) from None
    expected = 8 + length + end
    if size != expected:
        raise InputError(
            f"expected {expected} bytes in {file}, as its header says, got {size}; fetch it again"
        )
    return header


def write_durably(path: Path, text: str) -> None:
    """Replace a file atomically: after a crash it contains the old text or the new text."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)
    make_durable(path.parent)


def make_durable(*paths: Path) -> None:
    """Flush files and folders to disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def keep_steps(path: Path, last_step: int) -> None:
    """Remove lines of later steps from a JSONL file, because a run that continues from
    ``last_step`` writes them again.
    """
    lines = read_jsonl(path)
    kept = [line for line in lines if line["step"] <= last_step]
    if len(kept) < len(lines):
        write_durably(path, "".join(json.dumps(line) + "\n" for line in kept))
