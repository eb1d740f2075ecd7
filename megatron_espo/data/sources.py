"""Prompt sources: JSONL, Parquet and reasoning-gym tasks, held as Arrow columns."""

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from megatron_espo.data.messages import as_messages, describe, find_problem, shorten
from megatron_espo.data.reasoning_gym_task import generate_entries
from megatron_espo.errors import InputError

REASONING_GYM = "reasoning_gym:"
MAX_REPORTED = 10
_CHUNK_ROWS = 65_536
_CHUNK_BYTES = 16 << 20

logger = logging.getLogger(__name__)
# json.dumps() with this option makes a new encoder in every call.
_encode_text = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True)
class Row:
    """One checked row of a source.

    Attributes:
        where: ``file:line`` (JSONL), ``file:row n`` (Parquet, from 1) or
            ``reasoning_gym:task[index]``, for messages.
        id: the row's own id, or a name made of the file and line.
        prompt: text, or chat messages ``{role, content}``.
        answer: the value that the reward function compares with.
        metadata: the other columns; for a reasoning-gym row
            ``{"reasoning_gym": {"task", "task_args", "entry"}}``.
    """

    where: str
    id: str
    prompt: str | list[dict[str, str]]
    answer: str
    metadata: dict[str, Any]


class Rows(Sequence[Row]):
    """The rows of a source, in its order. Indexing makes a :class:`Row`.

    Args:
        table: columns ``number`` (line or row), ``id``, ``prompt`` (text, or messages as JSON),
            ``roles`` (of the messages, one a line; empty: ``prompt`` is text), ``answer`` and
            ``metadata`` (JSON; null: none).
        where: format of :attr:`Row.where`, with ``{number}``.
        metadata: metadata of each row, instead of the column.
    """

    def __init__(
        self, table: pa.Table, where: str, metadata: Sequence[dict[str, Any]] | None = None
    ) -> None:
        self.table, self._where, self._metadata = table.combine_chunks(), where, metadata
        self._columns = {name: self.table[name] for name in self.table.column_names}

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]  # no slices
        values = {name: column[index].as_py() for name, column in self._columns.items()}
        prompt, metadata = values["prompt"], json.loads(values["metadata"] or "{}")
        return Row(
            where=self._where.format(number=values["number"]),
            id=values["id"],
            prompt=json.loads(prompt) if values["roles"] else prompt,
            answer=values["answer"],
            metadata=metadata if self._metadata is None else self._metadata[index],
        )

    def find(self, identifier: str) -> int:
        """Index of the row with this id.

        Raises:
            KeyError: there is none.
        """
        index = pc.index(self._columns["id"], identifier).as_py()
        if index < 0:
            raise KeyError(identifier)
        return index


def raise_problems(source: str, problems: Sequence[str]) -> None:
    """Raise InputError if there are problems. It shows the first ones and their number."""
    if len(problems) == 1:
        raise InputError(problems[0])
    if problems:
        shown = list(problems[:MAX_REPORTED])
        if len(problems) > MAX_REPORTED:
            shown.append(f"... and {len(problems) - MAX_REPORTED} more")
        raise InputError("\n  ".join([f"{source}: {len(problems)} problems", *shown]))


def read_rows(
    prompts: str, task_args: Mapping[str, Any], seed: int, columns: Mapping[str, str] | None = None
) -> Rows:
    """All rows of the source ``prompts``, in its own order.

    A second call with the same arguments returns the same object, while the file is unchanged.

    Args:
        prompts: ``reasoning_gym:<task>``, or the path of a ``.jsonl`` or ``.parquet`` file.
        task_args: arguments of the reasoning-gym task (``size``, ``seed``, ...); empty for files.
        seed: used for a reasoning-gym task without a ``seed`` of its own.
        columns: where a file has ``prompt``, ``answer``, ``id`` and metadata, as
            ``{name: column}``; ``a.b`` is field ``b`` of column ``a``. Other columns are not read.
            Empty: ``prompt``, ``answer`` and optionally ``id``, and all other columns as metadata.

    Raises:
        InputError: no such task, malformed rows, duplicate ids, or no rows at all.
    """
    if prompts.startswith(REASONING_GYM):
        return _reasoning_gym_rows(prompts.removeprefix(REASONING_GYM), {"seed": seed, **task_args})
    path, key = Path(prompts), tuple(sorted((columns or {}).items()))
    status = path.stat()
    return _read_file(path, key, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2)
def _read_file(path: Path, columns: tuple[tuple[str, str], ...], *_: int) -> Rows:
    tables, number = [_as_table([])], 0
    problems: list[str] = []
    wanted = {"prompt": "prompt", "answer": "answer", **dict(columns)} if columns else {}
    is_jsonl = path.suffix == ".jsonl"
    where = f"{path}:{{number}}" if is_jsonl else f"{path}:row {{number}}"
    for chunk in _jsonl_chunks(path) if is_jsonl else _parquet_chunks(path, wanted):
        rows = []
        for record in chunk:
            number += 1
            if isinstance(record, bytes) and record.isspace():
                continue
            try:
                rows.append((number, *_check_record(record, wanted, f"{path.stem}:{number}")))
            except ValueError as error:
                problems.append(f"{where.format(number=number)}: {error}")
        tables.append(_as_table(rows))
    raise_problems(str(path), problems)
    found = Rows(pa.concat_tables(tables), where)
    if not found:
        raise InputError(f"{path}: expected at least one row, found none")
    _check_ids(found, path)
    repeated = len(found) - pc.count_distinct(found.table["prompt"]).as_py()
    if repeated:
        counts = f"{repeated:,} of {len(found):,}"
        logger.warning("%s: %s rows repeat the prompt of another row", path, counts)
    return found


_TABLE = pa.schema({
    "number": pa.int32(), "id": pa.large_string(), "prompt": pa.large_string(),
    "roles": pa.large_string(), "answer": pa.large_string(), "metadata": pa.large_string(),
})  # fmt: skip


def _as_table(rows: Sequence[tuple[Any, ...]]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [()] * len(_TABLE)
    return pa.table(dict(zip(_TABLE.names, columns, strict=True)), schema=_TABLE)


def _jsonl_chunks(path: Path) -> Iterator[list[bytes]]:
    """The lines of a file."""
    with path.open("rb") as file:
        chunks = iter(lambda: file.readlines(_CHUNK_BYTES), [])
        yield from _with_bar(chunks, path, path.stat().st_size / _CHUNK_BYTES)


def _parquet_chunks(path: Path, wanted: Mapping[str, str]) -> Iterator[list[dict[str, Any]]]:
    """The rows of a file, with the columns that hold ``wanted`` (empty: all columns)."""
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            needed = list(wanted.values()) or ["prompt", "answer"]
            columns = [name if name in names else name.partition(".")[0] for name in needed]
            if not set(columns) <= set(names):
                raise InputError(
                    f"{path}: expected the columns {' and '.join(needed)}, got "
                    f"{', '.join(names)}; name them in data.columns, such as "
                    "{prompt: question, answer: reward_model.ground_truth}"
                )
            chunks = file.iter_batches(_CHUNK_ROWS, columns=columns if wanted else None)
            for chunk in _with_bar(chunks, path, file.metadata.num_rows / _CHUNK_ROWS):
                yield chunk.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: expected a Parquet file: {error}") from error


def _with_bar(chunks: Iterable[Any], path: Path, count: float) -> Iterator[Any]:
    """``chunks``, with a progress bar on a terminal (standard error)."""
    yield from tqdm(chunks, f"reading {path.name}", math.ceil(count), leave=False, disable=None)


_ABSENT = object()


def _field(record: Mapping[str, Any], path: str) -> Any:
    """Column ``path`` of a record, or field ``b`` of column ``a`` for ``a.b``."""
    if path in record:
        return record[path]
    value: Any = record
    for name in path.split("."):
        if isinstance(value, str) and value.lstrip().startswith("{"):
            with suppress(ValueError):
                value = json.loads(value)
        if not isinstance(value, Mapping) or name not in value:
            return _ABSENT
        value = value[name]
    return value


def _check_record(
    record: Any, wanted: Mapping[str, str], default_id: str
) -> tuple[str, str, str, str, str | None]:
    """The columns of a record from ``id`` on.

    Args:
        record: a row of a Parquet file, or a line of a JSONL file.

    Raises:
        ValueError: what is wrong with the record.
    """
    if isinstance(record, bytes):
        try:
            record = json.loads(record)
        except (ValueError, RecursionError) as error:
            got = f"{shorten(record)} ({error})"
            raise ValueError(f"expected one JSON object in UTF-8, got {got}") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with prompt and answer, got {describe(record)}")
    if wanted:
        fields = ((name, _field(record, path)) for name, path in wanted.items())
        record = {name: value for name, value in fields if value is not _ABSENT}
    for name in ("prompt", "answer"):
        if name not in record:
            raise ValueError(
                f"{name}: expected this key, got {', '.join(record) or 'none'}; rename it, or "
                "name it in data.columns"
            )
    metadata = dict(record)
    prompt, answer = as_messages(metadata.pop("prompt")), metadata.pop("answer")
    identifier = metadata.pop("id", None)
    if problem := find_problem(prompt):
        raise ValueError(f"prompt: {problem}")
    if isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer):
        answer = str(answer)
    if not isinstance(answer, str):
        raise ValueError(f"answer: expected text or a number, got {describe(answer)}")
    if isinstance(identifier, bool) or not isinstance(identifier, str | int | None):
        raise ValueError(f"id: expected text or an integer, got {describe(identifier)}")
    roles = ""
    if not isinstance(prompt, str):
        # Parquet gives every message the fields of all; templates ask whether a field exists.
        messages = [{n: v for n, v in message.items() if v is not None} for message in prompt]
        roles = "\n".join(message["role"] for message in messages)
        prompt = _encode_text(messages)
    try:
        f"{prompt}{answer}{identifier}".encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"expected valid Unicode, got a lone surrogate ({error})") from None
    identifier = default_id if identifier is None else str(identifier)
    return identifier, prompt, roles, answer, _encode(metadata) if metadata else None


def _encode(metadata: Mapping[str, Any]) -> str:
    for name, value in metadata.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise ValueError(
                f"{name}: expected a value that JSON can hold, got {describe(value)}; convert the "
                "column, or name only the columns that you need in data.columns"
            ) from None
    return json.dumps(metadata)


def _check_ids(rows: Rows, path: Path) -> None:
    ids = rows.table["id"]
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    first: dict[str, int] = {}
    problems = []
    for index, identifier in enumerate(ids.to_pylist()):
        if (other := first.setdefault(identifier, index)) != index:
            used = f"id {identifier!r} is already used by {rows[other].where}"
            problems.append(f"{rows[index].where}: {used}; ids must be unique")
    raise_problems(str(path), problems)


def _reasoning_gym_rows(task: str, task_args: dict[str, Any]) -> Rows:
    entries = generate_entries(task, task_args)
    rows = []
    for number, entry in enumerate(entries):
        # Some tasks have no single right answer and leave it None; their verifier reads the entry.
        answer = "" if entry["answer"] is None else str(entry["answer"])
        rows.append((number, f"{task}-{number}", entry["question"], "", answer, None))
    source = {"task": task, "task_args": task_args}
    metadata = [{"reasoning_gym": source | {"entry": entry}} for entry in entries]
    return Rows(_as_table(rows), f"{REASONING_GYM}{task}[{{number}}]", metadata)
