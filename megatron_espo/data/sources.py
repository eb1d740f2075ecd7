"""Prompt sources: JSONL, Parquet and reasoning-gym tasks, held as Arrow columns."""

import codecs
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.json import read_json
from tqdm import tqdm

from megatron_espo.config.tasks import Source
from megatron_espo.data.messages import WRITTEN, as_messages, describe, find_problem, shorten
from megatron_espo.data.reasoning_gym_task import generate_entries
from megatron_espo.errors import InputError

REASONING_GYM = "reasoning_gym:"
MAX_REPORTED = 10
_CHUNK_ROWS, _CHUNK_BYTES = 65_536, 16 << 20  # of Parquet, of JSONL

_CHOOSE_COLUMNS = "convert the column, or name only the columns that you need in data.columns"

logger = logging.getLogger(__name__)


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
        table: columns ``number`` (line or row), ``id`` (null: no own id), ``prompt`` (text, or
            messages as JSON), ``is_chat``, ``messages`` (null: ``prompt`` has them; otherwise
            ``prompt`` holds their contents), ``kind`` (the messages' roles), ``answer``,
            ``metadata`` (JSON; null: none) and ``pass_rate`` (null: not read, or not known).
        where: :attr:`Row.where`, with ``{number}`` for the number.
        prefix: of the id of a row without one; its number follows.
        metadata: metadata of each row, instead of the column.
    """

    def __init__(
        self,
        table: pa.Table,
        where: str,
        prefix: str,
        metadata: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        self.table, self._metadata = table.combine_chunks(), metadata
        self._where = where
        numbers = self.table["number"].cast(pa.large_string())
        head, between = (pa.scalar(text, pa.large_string()) for text in (prefix, ""))
        default = pc.binary_join_element_wise(head, numbers, between)
        self.ids = pc.coalesce(self.table["id"], default)
        self._columns = {name: self.table[name] for name in self.table.column_names}
        self._columns["id"] = self.ids

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        values = {name: column[index].as_py() for name, column in self._columns.items()}
        prompt, metadata = values["messages"], values["metadata"]
        if prompt is None:
            prompt = json.loads(values["prompt"]) if values["is_chat"] else values["prompt"]
        if self._metadata is not None:
            extra = self._metadata[index]
        else:
            extra = {} if metadata is None else json.loads(metadata)
        return Row(self.where(values["number"]), values["id"], prompt, values["answer"], extra)

    def where(self, number: int) -> str:
        """:attr:`Row.where` of a line or row."""
        return self._where.replace("{number}", str(number))

    def find(self, identifier: str) -> int:
        """Index of the row with this id.

        Raises:
            KeyError: there is none.
        """
        index = pc.index(self.ids, identifier).as_py()
        if index < 0:
            raise KeyError(identifier)
        return index


def raise_problems(source: str, problems: Sequence[str]) -> None:
    """Raise InputError with the first mistakes in the rows of ``source`` and their number."""
    if problems:
        head = [f"{source}: {len(problems)} problems"] if len(problems) > 1 else []
        more = len(problems) - MAX_REPORTED
        tail = [f"... and {more} more"] if more > 0 else []
        raise InputError("\n  ".join([*head, *problems[:MAX_REPORTED], *tail]))


class MissingColumns(InputError):
    """A file lacks columns that the settings name."""


def read_rows(source: Source, seed: int) -> Rows:
    """All rows of ``source``, in its own order, also those outside of its ``pass_rate``.

    A second call with the same arguments returns the same object, while the file is unchanged.

    Args:
        source: the settings.
        seed: used for a reasoning-gym task without a ``seed`` of its own.

    Raises:
        InputError: no such source, malformed rows, duplicate ids, or no rows at all.
        MissingColumns: see there (Parquet).
    """
    if source.prompts.startswith(REASONING_GYM):
        task = source.prompts.removeprefix(REASONING_GYM)
        return _reasoning_gym_rows(task, {"seed": seed, **source.task_args})
    path = Path(source.prompts)
    if not path.is_file():
        raise InputError(f"data.prompts: no such file: {path} (looked for {path.absolute()})")
    needed = ("prompt", "answer", *["pass_rate"] * bool(source.pass_rate))
    status, columns = path.stat(), tuple(sorted(source.columns.items()))
    return _read_file(path, needed, columns, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=16)
def _read_file(
    path: Path, needed: tuple[str, ...], columns: tuple[tuple[str, str], ...], *_: int
) -> Rows:
    wanted = dict(zip(needed, needed, strict=True)) | dict(columns) if columns else {}
    is_jsonl = path.suffix == ".jsonl"
    where = f"{path}:{{number}}" if is_jsonl else f"{path}:row {{number}}"
    reader = _Reader(path, where, needed, wanted)
    chunks = reader.read_jsonl() if is_jsonl else reader.read_parquet()
    table = pa.concat_tables([_TABLE.empty_table(), *chunks])
    rows = Rows(table, where, f"{path.stem}:")
    raise_problems(str(path), reader.problems + _repeated_ids(rows))
    if not rows:
        raise InputError(f"{path}: expected at least one row, found none")
    repeated = len(rows) - pc.count_distinct(rows.table["prompt"]).as_py()
    if repeated:
        counts = (f"{repeated:,}", f"{len(rows):,}")
        logger.warning("%s: %s of %s rows repeat the prompt of another row", path, *counts)
    return rows


_MESSAGE = pa.struct({"role": pa.large_string(), "content": pa.large_string()})
_TABLE = pa.schema({
    "number": pa.int32(), "id": pa.large_string(), "prompt": pa.large_string(),
    "is_chat": pa.bool_(), "messages": pa.large_list(_MESSAGE), "kind": pa.large_string(),
    "answer": pa.large_string(), "metadata": pa.large_string(), "pass_rate": pa.float64(),
})  # fmt: skip


@dataclass(frozen=True)
class _Reader:
    """Reads a file as chunks of :data:`_TABLE`, and collects the mistakes in its rows.

    Attributes:
        where: as in :class:`Rows`.
        needed: columns that every row has.
        wanted: paths of the columns to read, by name; empty: all columns.
    """

    path: Path
    where: str
    needed: Sequence[str]
    wanted: Mapping[str, str]
    problems: list[str] = field(default_factory=list)

    def read_jsonl(self) -> Iterator[pa.Table]:
        number = 1
        with self.path.open("rb") as file, self._progress(self.path.stat().st_size) as bar:
            while lines := file.readlines(_CHUNK_BYTES):
                if number == 1:
                    lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
                batch = _json_batch(lines)
                chunk = batch and self._fast_table(batch, number - 1)
                yield chunk or self._table(self._json_records(lines, number))
                number += len(lines)
                bar.update(sum(map(len, lines)))

    def _json_records(self, lines: Iterable[bytes], start: int) -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(lines, start):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                what = f"expected one JSON object in UTF-8, got {shorten(line)} ({error})"
                self._note(number, what)
            else:
                yield number, record

    def read_parquet(self) -> Iterator[pa.Table]:
        from pyarrow.parquet import ParquetFile

        try:
            with ParquetFile(self.path) as file:
                columns = self._stored_columns(file.schema_arrow)
                if self.problems:
                    return
                number, batches = 0, file.iter_batches(batch_size=_CHUNK_ROWS, columns=columns)
                with self._progress(file.metadata.num_rows) as bar:
                    for batch in batches:
                        chunk = self._fast_table(batch, number)
                        yield chunk or self._table(enumerate(batch.to_pylist(), number + 1))
                        number += len(batch)
                        bar.update(len(batch))
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{self.path}: expected a Parquet file, got an unreadable one ({error}); write it "
                "again"
            ) from error

    def _stored_columns(self, schema: pa.Schema) -> list[str] | None:
        """The columns of a Parquet file to read; ``None``: all."""
        needed = list(self.wanted.values()) or self.needed
        if any(name.partition(".")[0] not in schema.names for name in needed):
            raise MissingColumns(
                f"{self.path}: expected the columns {' and '.join(needed)}, got "
                f"{', '.join(schema.names)}; name them in data.columns, such as "
                "{prompt: question, answer: reward_model.ground_truth}"
            )
        columns = [_stored(path, schema) for path in self.wanted.values()] or None
        for column in schema:
            if (columns is None or column.name in columns) and not _fits_json(column.type):
                what = f"{column.name}: expected values that JSON can hold, got {column.type}"
                self.problems.append(f"{self.path}: {what}; {_CHOOSE_COLUMNS}")
        return columns

    def _progress(self, total: int) -> tqdm:
        """Show a bar on a terminal, for a file that takes more than a second."""
        name = f"reading {self.path.name}"
        return tqdm(None, name, total, disable=None, leave=False, delay=1, unit_scale=True)

    def _fast_table(self, batch: pa.RecordBatch, before: int) -> pa.Table | None:
        """The chunk of correct rows with the needed columns only; ``None``: look at each row."""
        names = self.wanted or {name: name for name in batch.schema.names}
        if set(names) != set(self.needed):
            return None
        columns: dict[str, Any] = {name: _nested(batch, names[name]) for name in self.needed}
        if any(column is None for column in columns.values()):
            return None
        prompt, answer, rate = columns["prompt"], columns["answer"], columns.get("pass_rate")
        if prompt.null_count or answer.null_count:
            return None
        if not (_is_text(answer.type) or pa.types.is_integer(answer.type)):
            return None
        if rate is not None:
            if not (pa.types.is_floating(rate.type) or pa.types.is_integer(rate.type)):
                return None
            if not pc.all(pc.and_(pc.greater_equal(rate, 0), pc.less_equal(rate, 1))).as_py():
                return None
        size, is_chat = len(batch), not _is_text(prompt.type)
        columns["number"] = pa.array(range(before + 1, before + size + 1))
        columns |= {"is_chat": pa.repeat(is_chat, size), "kind": pa.repeat("", size)}
        if is_chat:
            parts = _message_parts(prompt)
            if parts is None:
                return None
            columns["messages"] = prompt
            columns["kind"], columns["prompt"], prompt = parts
        elif pc.any(pc.match_substring_regex(prompt, WRITTEN)).as_py():
            return None
        if pc.any(pc.equal(pc.utf8_trim_whitespace(prompt), "")).as_py():
            return None
        absent = pa.nulls(size)
        arrays = [columns.get(field.name, absent).cast(field.type) for field in _TABLE]
        return pa.Table.from_arrays(arrays, schema=_TABLE)

    def _note(self, number: int, problem: str) -> None:
        # Millions of rows may be wrong: only their number is kept after the first.
        shown = len(self.problems) < MAX_REPORTED
        where = self.where.replace("{number}", str(number))
        self.problems.append(f"{where}: {problem}" if shown else "")

    def _table(self, records: Iterable[tuple[int, Any]]) -> pa.Table:
        """The chunk of the correct records."""
        rows = []
        for number, record in records:
            row, problems = self._check(record)
            for problem in problems:
                self._note(number, problem)
            if not problems:
                rows.append(row | {"number": number})
        return pa.Table.from_pylist(rows, schema=_TABLE)

    def _check(self, record: Any) -> tuple[dict[str, Any], list[str]]:
        """The columns of a record, without ``number``, and its mistakes."""
        if not isinstance(record, dict):
            return {}, [f"expected an object with prompt and answer, got {describe(record)}"]
        if self.wanted:
            record = {name: _field(record, path) for name, path in self.wanted.items()}
            record = {name: value for name, value in record.items() if value is not _ABSENT}
        got = ", ".join(record) or "none"
        problems = [
            f"{name}: expected this key, got {got}; rename it, or name it in data.columns"
            for name in self.needed
            if name not in record
        ]
        prompt: Any = as_messages(record.get("prompt"))
        if "prompt" in record and (problem := find_problem(prompt)):
            problems.append(f"prompt: {problem}")
        answer: Any = record.get("answer")
        is_number = isinstance(answer, int | float) and not isinstance(answer, bool)
        if is_number and math.isfinite(answer):
            answer = str(answer)
        if "answer" in record and not isinstance(answer, str):
            problems.append(f"answer: expected text or a number, got {describe(answer)}")
        identifier = record.get("id")
        if isinstance(identifier, bool) or not isinstance(identifier, str | int | None):
            problems.append(f"id: expected text or an integer, got {describe(identifier)}")
        rate = record.get("pass_rate") if "pass_rate" in self.needed else None
        if rate is not None and not (type(rate) in (int, float) and 0 <= rate <= 1):
            problems.append(f"pass_rate: expected 0 to 1, or null, got {describe(rate)}")
        if problems:
            return {}, problems
        metadata = {n: value for n, value in record.items() if n not in ("id", *self.needed)}
        is_chat, kind = not isinstance(prompt, str), ""
        if is_chat:
            # Parquet gives every message the fields of all; templates ask whether a field exists.
            messages = [{n: v for n, v in message.items() if v is not None} for message in prompt]
            kind = "\n".join(message["role"] for message in messages)
            prompt = json.dumps(messages, ensure_ascii=False)
        row = {"prompt": prompt, "is_chat": is_chat, "kind": kind, "answer": answer}
        row |= {"id": None if identifier is None else str(identifier), "pass_rate": rate}
        try:
            f"{prompt}{answer}{identifier}".encode()
        except UnicodeEncodeError as error:
            return {}, [f"expected valid Unicode, got a lone surrogate ({error})"]
        return row | {"metadata": json.dumps(metadata) if metadata else None}, []


def _json_batch(lines: Sequence[bytes]) -> pa.RecordBatch | None:
    """One row for each line; ``None``: Arrow reads these lines in another way than Python."""
    text = b"".join(lines)
    try:
        text.decode()
        table = read_json(pa.BufferReader(text))
        (batch,) = table.combine_chunks().to_batches()
    except (ValueError, pa.ArrowException):
        return None
    return batch if len(batch) == len(lines) and not any(map(bytes.isspace, lines)) else None


def _stored(path: str, schema: pa.Schema) -> str:
    """The column to read for ``path``: the whole column if it holds JSON text."""
    first = path.partition(".")[0]
    return first if path not in schema.names and _is_text(schema.field(first).type) else path


def _message_parts(messages: pa.Array) -> tuple[pa.Array, ...] | None:
    """Joined roles, joined contents and last content of messages with these two fields only.

    ``None``: roles or types are wrong.
    """
    kind = messages.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not pa.types.is_struct(kind.value_type):
        return None
    if {field.name for field in kind.value_type} != {"role", "content"}:
        return None
    if pc.any(pc.equal(pc.list_value_length(messages), 0)).as_py():
        return None
    joined = []
    for name in ("role", "content"):
        values = pc.struct_field(messages.values, name)
        if values.null_count or not _is_text(values.type):
            return None
        if name == "role" and pc.any(pc.match_substring(values, "\n")).as_py():
            return None
        texts = pa.LargeListArray.from_arrays(
            messages.offsets.cast(pa.int64()), values.cast(pa.large_string())
        )
        joined.append(pc.binary_join(texts, pa.scalar("\n", pa.large_string())))
    kinds = (kind.split("\n") for kind in pc.unique(joined[0]).to_pylist())
    messages_of = ([{"role": role, "content": "x"} for role in kind] for kind in kinds)
    last = values.take(pc.subtract(messages.offsets[1:], 1))
    return None if any(map(find_problem, messages_of)) else (*joined, last)


def _fits_json(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return _fits_json(kind.storage_type)
    if isinstance(kind, pa.DictionaryType):
        return _fits_json(kind.value_type)
    inner = [kind.field(i).type for i in range(kind.num_fields)]
    plain = "null boolean integer floating string large_string string_view".split()
    is_plain = any(getattr(pa.types, f"is_{name}")(kind) for name in plain)
    return all(map(_fits_json, inner)) if inner else is_plain


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _nested(batch: pa.RecordBatch, path: str) -> pa.Array | None:
    """Column ``path``, or field ``b`` of column ``a`` for ``a.b``; ``None``: it does not exist."""
    if path in batch.schema.names:
        return batch.column(path)
    first, *rest = path.split(".")
    if first in batch.schema.names and not batch.column(first).null_count:
        with suppress(pa.ArrowException):  # no such field
            return pc.struct_field(batch.column(first), rest)
    return None


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


def _repeated_ids(rows: Rows) -> list[str]:
    own = rows.table["id"]
    if own.null_count == len(own) or pc.count_distinct(rows.ids).as_py() == len(own):
        return []
    first: dict[str, int] = {}
    problems, numbers = [], rows.table["number"].to_pylist()
    for number, identifier in zip(numbers, rows.ids.to_pylist(), strict=True):
        earlier = first.setdefault(identifier, number)
        if earlier != number:
            used = f"id {identifier!r} is already used by {rows.where(earlier)}"
            problems.append(f"{rows.where(number)}: {used}; ids must be unique")
    return problems


def _reasoning_gym_rows(task: str, task_args: dict[str, Any]) -> Rows:
    entries = generate_entries(task, task_args)
    # Some tasks have no single right answer and leave it None; their verifier reads the entry.
    answers = ["" if entry["answer"] is None else str(entry["answer"]) for entry in entries]
    rows = [
        {"number": i, "prompt": entry["question"], "answer": answer, "is_chat": False, "kind": ""}
        for i, (entry, answer) in enumerate(zip(entries, answers, strict=True))
    ]
    table = pa.Table.from_pylist(rows, schema=_TABLE)
    metadata = [
        {"reasoning_gym": {"task": task, "task_args": task_args, "entry": entry}}
        for entry in entries
    ]
    return Rows(table, f"{REASONING_GYM}{task}[{{number}}]", f"{task}-", metadata)
