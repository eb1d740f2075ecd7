"""Prompt sources: JSONL, Parquet and reasoning-gym tasks, read and checked in full before anything else starts."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_espo.data.reasoning_gym_task import generate_entries
from megatron_espo.errors import InputError

REASONING_GYM = "reasoning_gym:"
MAX_REPORTED = 10


@dataclass(frozen=True)
class Row:
    """One checked row of a source.

    Attributes:
        where: ``file:line`` (JSONL), ``file:row n`` (Parquet, from 1) or ``reasoning_gym:task[index]``, for messages.
        id: the row's own id, or a name made of the file and line.
        prompt: text, or chat messages ``{role, content}``.
        answer: what the reward function compares with.
        metadata: the other columns; for a reasoning-gym row ``{"reasoning_gym": {"task", "task_args", "entry"}}``.
    """

    where: str
    id: str
    prompt: str | list[dict[str, str]]
    answer: str
    metadata: dict[str, Any]


@dataclass
class Problems:
    """Collects what is wrong with rows, so that one run of the program shows many mistakes at once."""

    shown: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, where: str, what: str) -> None:
        self.count += 1
        if len(self.shown) < MAX_REPORTED:
            self.shown.append(f"{where}: {what}")

    def raise_if_any(self, source: str) -> None:
        """Raises InputError naming the first problems and their number."""
        if self.count == 1:
            raise InputError(self.shown[0])
        if self.count:
            more = self.count - len(self.shown)
            tail = f"\n  ... and {more} more" if more else ""
            raise InputError(f"{source}: {self.count} problems\n  " + "\n  ".join(self.shown) + tail)


def read_rows(prompts: str, task_args: dict[str, Any], seed: int) -> list[Row]:
    """All rows of the source ``prompts``, in its own order.

    Args:
        prompts: ``reasoning_gym:<task>``, or the path of a ``.jsonl`` or ``.parquet`` file with the columns ``prompt``,
            ``answer`` and optionally ``id``.
        task_args: arguments of the reasoning-gym task (``size``, ``seed``, ...); must be empty for files.
        seed: used for a reasoning-gym task without a ``seed`` of its own.

    Raises:
        InputError: no such source, malformed rows, duplicate ids, or no rows at all.
    """
    if prompts.startswith(REASONING_GYM):
        return _reasoning_gym_rows(prompts.removeprefix(REASONING_GYM), {"seed": seed} | task_args)
    if task_args:
        raise InputError(f"data.task_args: only for {REASONING_GYM}<task>; data.prompts is {prompts!r}")
    readers = {".jsonl": _jsonl_records, ".parquet": _parquet_records}
    path = Path(prompts)
    if path.suffix not in readers:
        raise InputError(
            f"data.prompts: expected {REASONING_GYM}<task>, *.jsonl or *.parquet, got {prompts!r}; convert the file"
        )
    if not path.is_file():
        raise InputError(f"data.prompts: no such file: {path} (looked for {path.absolute()})")

    problems, rows, seen = Problems(), [], {}
    for where, number, record in readers[path.suffix](path, problems):
        row = _check_record(where, f"{path.stem}:{number}", record, problems)
        if row is None:
            continue
        if row.id in seen:
            problems.add(where, f"id {row.id!r} is already used by {seen[row.id]}; ids must be unique")
        seen[row.id] = where
        rows.append(row)
    problems.raise_if_any(str(path))
    if not rows:
        raise InputError(f"{path}: expected at least one row, found none")
    return rows


def _jsonl_records(path: Path, problems: Problems) -> Iterator[tuple[str, int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                problems.add(where, f"expected one JSON object in UTF-8, got {_shorten(line)} ({error})")
                continue
            yield where, number, record


def _parquet_records(path: Path, problems: Problems) -> Iterator[tuple[str, int, Any]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            columns = file.schema_arrow.names
            missing = [name for name in ("prompt", "answer") if name not in columns]
            if missing:
                problems.add(str(path), f"expected the columns prompt and answer, got {', '.join(columns)}")
                return
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}:row {number}", number, record
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: expected a Parquet file, got one that cannot be read ({error}); write it again") from error


def _check_record(where: str, default_id: str, record: Any, problems: Problems) -> Row | None:
    """The row that ``record`` makes, or None with the reason added to ``problems``."""
    if not isinstance(record, dict):
        problems.add(where, f"expected an object with prompt and answer, got {_describe(record)}")
        return None
    before = problems.count
    for name in ("prompt", "answer"):
        if name not in record:
            problems.add(where, f"{name}: expected this key, got {', '.join(record) or 'none'}; rename or add it")
    if "prompt" in record:
        _check_prompt(where, record["prompt"], problems)
    if "answer" in record and not isinstance(record["answer"], str):
        problems.add(where, f"answer: expected text, got {_describe(record['answer'])}; write it as a string")
    identifier = record.get("id")
    if isinstance(identifier, bool) or not isinstance(identifier, str | int | None):
        problems.add(where, f"id: expected text or an integer, got {_describe(identifier)}")
    if problems.count > before:
        return None
    prompt, answer = record["prompt"], record["answer"]
    try:
        json.dumps([prompt, answer], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        problems.add(where, f"expected valid Unicode, got a lone surrogate ({error})")
        return None
    metadata = {name: value for name, value in record.items() if name not in ("id", "prompt", "answer")}
    if not isinstance(prompt, str):
        # Parquet gives every message the fields of all; templates ask whether a field is there, not whether it is None.
        prompt = [{name: value for name, value in message.items() if value is not None} for message in prompt]
    return Row(where, default_id if identifier is None else str(identifier), prompt, answer, metadata)


def _check_prompt(where: str, prompt: Any, problems: Problems) -> None:
    if isinstance(prompt, str):
        if not prompt.strip():
            problems.add(where, "prompt: expected text, got an empty one")
        return
    if not isinstance(prompt, list) or not prompt:
        problems.add(where, f"prompt: expected text or a list of messages, got {_describe(prompt)}")
        return
    for index, message in enumerate(prompt):
        fields = message if isinstance(message, dict) else {}
        if not all(isinstance(fields.get(name), str) for name in ("role", "content")):
            got = _describe(message)
            problems.add(where, f"prompt[{index}]: expected {{role, content}} with text in both, got {got}")
            return
    if prompt[-1]["role"] == "assistant":
        problems.add(where, "prompt: the last message is the assistant's; expected the user's, for the model to answer")


def _reasoning_gym_rows(task: str, task_args: dict[str, Any]) -> list[Row]:
    rows = []
    for index, entry in enumerate(generate_entries(task, task_args)):
        metadata = {"reasoning_gym": {"task": task, "task_args": task_args, "entry": entry}}
        # Some tasks have no single right answer and leave it None; their verifier reads the entry.
        answer = "" if entry["answer"] is None else str(entry["answer"])
        where = f"{REASONING_GYM}{task}[{index}]"
        rows.append(Row(where, f"{task}-{index}", entry["question"], answer, metadata))
    return rows


def _describe(value: Any) -> str:
    return f"{type(value).__name__} {_shorten(repr(value))}"


def _shorten(value: str | bytes) -> str:
    text = value.decode("utf-8", "replace").strip() if isinstance(value, bytes) else value
    return text if len(text) <= 60 else text[:57] + "..."
