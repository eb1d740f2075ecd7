"""The endless, resumable stream of prompts."""

import hashlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow.compute as pc

from megatron_espo.config import Data
from megatron_espo.config.tasks import Source
from megatron_espo.data.sources import Row, Rows, raise_problems, read_rows
from megatron_espo.data.tokenizer import Messages, Tokenizer
from megatron_espo.errors import InputError
from megatron_espo.types import Prompt

# Of a larger source only rows that could be too long are tokenized at the start.
_TOKENIZE_ALL_UP_TO = 20_000
# Tokens of a prompt beyond the bytes of its text: a beginning of sequence, a prefix blank.
_EXTRA_TOKENS = 8


class _Epochs:
    """Endless rows of one source, every row once per epoch, in an order of ``(seed, epoch)`` only.

    Args:
        name: in ``data.mixture``, or empty.
        settings: of the source.
        seed: of the order.
        shuffle: false keeps the order of the file.
        share: of the source in the stream.

    Attributes:
        rows: all rows.
        epoch: passes over all rows completed so far.
        solved: in how many of its next epochs a row is skipped, by prompt id.
    """

    def __init__(
        self, name: str, settings: Source, seed: int, shuffle: bool, share: Fraction
    ) -> None:
        self.rows, limits = read_rows(settings, seed), settings.pass_rate
        self.name, self.prompts, self.share = name, settings.prompts, share
        self._kept = _within(self.rows, limits)
        if not len(self._kept):
            expected, found = f"a row in {list(limits)}", f"none of {len(self.rows):,}"
            raise InputError(f"{settings.prompts}: pass_rate: expected {expected}, got {found}")
        self._identity = {"seed": seed, "shuffle": shuffle, "share": str(share)}
        self._identity["fingerprint"] = _fingerprint(self.rows, self._kept)
        self.solved: dict[str, int] = {}
        self._passed = 0  # because of ``solved``
        self._start_epoch(0)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def taken(self) -> int:
        """Number of rows that were returned."""
        return self.epoch * len(self) + self._position - self._passed

    @property
    def skipped(self) -> int:
        """Number of rows that were not; those outside of ``pass_rate`` count as an epoch starts."""
        return (self.epoch + 1) * (len(self.rows) - len(self)) + self._passed

    def next(self) -> Row:
        """The next row that is not skipped."""
        while True:
            row = self.rows[int(self._order[self._position])]
            self._position += 1
            if self._position == len(self):
                self._start_epoch(self.epoch + 1)
            name = self.id_of(row)
            if name not in self.solved:
                return row
            self._passed += 1
            self.solved[name] -= 1
            if not self.solved[name]:
                del self.solved[name]

    def id_of(self, row: Row) -> str:
        """Id of the row's prompt, unique in the stream."""
        return f"{self.name}/{row.id}" if self.name else row.id

    def state_dict(self) -> dict[str, Any]:
        position = {"epoch": self.epoch, "position": self._position}
        return position | {"passed": self._passed, "solved": dict(self.solved)} | self._identity

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, own in self._identity.items():
            meaning = f"rows of {self.prompts}" if name == "fingerprint" else name
            if state[name] != own:
                raise _changed(meaning, state[name], own)
        if state["epoch"] != self.epoch:
            self._start_epoch(state["epoch"])
        self._position, self._passed = state["position"], state["passed"]
        self.solved = dict(state["solved"])

    def _start_epoch(self, epoch: int) -> None:
        self.epoch, self._position = epoch, 0
        order = self._kept.tolist()
        if self._identity["shuffle"]:
            # Sorting by a hash gives the same order in every Python version.
            key = f"{self._identity['seed']}/{epoch}/{self.name}"
            order.sort(key=lambda index: hashlib.blake2b(f"{key}{index}".encode()).digest())
        self._order = np.array(order, np.int32)


class PromptStream:
    """Endless prompts from the sources of ``data``, every row once per epoch of its source.

    All rows are read and checked on construction, so a bad row stops the run before any model is
    loaded. Prompts are rendered and tokenized when they are taken. One ``take`` may reach over the
    end of an epoch and then hold a row twice. The order is one of seed, settings, numbers of
    prompts taken and solved prompts only.

    Args:
        data: the ``data`` section of the configuration.
        tokenizer: the trainer's tokenizer.
        seed: of the order, and of a reasoning-gym task without a seed of its own.
        max_response_tokens: tokens that a response may take.
        max_model_len: the context of the rollout engine, prompt and response together.

    Raises:
        InputError: malformed rows, rows whose prompt and response do not fit the context, or that
            cannot be rendered.
    """

    def __init__(
        self,
        data: Data,
        tokenizer: Tokenizer,
        seed: int,
        *,
        max_response_tokens: int,
        max_model_len: int,
    ) -> None:
        self._tokenizer, self._data = tokenizer, data
        self._sources: dict[str, _Epochs] = {}
        total = sum(Fraction(str(settings.weight)) for settings in data.sources.values())
        for path, settings in data.sources.items():
            name = path.rpartition(".")[2] if data.mixture else ""
            share = Fraction(str(settings.weight)) / total
            source = self._sources[name] = _Epochs(name, settings, seed, data.shuffle, share)
            self._check_rows(source, max_response_tokens, max_model_len)

    def __len__(self) -> int:
        """Rows that can be taken in one epoch of each source."""
        return sum(map(len, self._sources.values()))

    @property
    def skipped(self) -> int:
        """Number of prompts that filters skipped so far."""
        return sum(source.skipped for source in self._sources.values())

    def take(self, n: int) -> list[Prompt]:
        """The next ``n`` prompts. Each source has its share of them, rounded up or down."""
        return [self._make_prompt(source, source.next()) for source in self._schedule(n)]

    def _schedule(self, n: int) -> list[_Epochs]:
        """The sources of the next ``n`` prompts, evenly mixed. Those that lack most are rounded up,
        so that the share holds over many calls too.
        """
        sources = self._sources.values()
        total = n + sum(source.taken for source in sources)
        counts = {source: int(source.share * n) for source in sources}
        uneven = [source for source in sources if source.share * n > counts[source]]
        uneven.sort(key=lambda s: s.taken + counts[s] - s.share * total)
        for source in uneven[: n - sum(counts.values())]:
            counts[source] += 1
        slots = [((i + 0.5) / count, s) for s, count in counts.items() for i in range(count)]
        return [source for _, source in sorted(slots, key=lambda slot: slot[0])]

    def note_solved(self, prompt: Prompt) -> None:
        """All responses of ``prompt`` were right: skip it as ``data.skip_solved`` says."""
        if epochs := self._data.skip_solved:
            self._sources[prompt.source].solved[prompt.id] = epochs

    def find(self, ids: Sequence[str]) -> list[Prompt]:
        """Prompts by their ids; the stream does not move."""
        found = []
        for name in ids:
            first, _, rest = name.partition("/") if self._data.mixture else ("", "", name)
            rows = self._sources[first].rows
            found.append(self._make_prompt(self._sources[first], rows[rows.find(rest)]))
        return found

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream, as plain JSON values."""
        return {name: source.state_dict() for name, source in self._sources.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at ``state``: the next ``take`` gives what it would have given there.

        Raises:
            InputError: the state belongs to other rows or to another order.
        """
        if state.keys() != self._sources.keys():
            raise _changed("sources", list(state), list(self._sources))
        for name, source in self._sources.items():
            source.load_state_dict(state[name])

    def _make_prompt(self, source: _Epochs, row: Row) -> Prompt:
        prompt, token_ids = self._encode(row)
        text, rest = self._tokenizer.render(prompt), (row.metadata, source.name)
        return Prompt(source.id_of(row), text, row.answer, tuple(token_ids), *rest)

    def _encode(self, row: Row) -> tuple[str | Messages, list[int]]:
        """The prompt of a row with the system prompt, and its token ids.

        Raises:
            InputError: it cannot be rendered, or has no or unknown ids.
        """
        prompt = self._with_system_prompt(row.prompt)
        if self._data.raw and isinstance(prompt, str):  # it has its own special tokens
            token_ids = self._tokenizer.encode(prompt)
        else:
            token_ids = self._tokenizer.encode_prompt(prompt)
        size = self._tokenizer.vocab_size
        if not token_ids or max(token_ids) >= size:
            got = f"id {max(token_ids)}" if token_ids else "none"
            raise InputError(
                f"{row.where}: expected token ids below {size}, the model's vocab_size, got {got}; "
                "is the tokenizer another model's?"
            )
        return prompt, token_ids

    def _with_system_prompt(self, prompt: str | Messages) -> str | Messages:
        system = self._data.system_prompt
        if isinstance(prompt, str):
            if self._data.raw or not self._tokenizer.has_chat_template:
                return f"{system}\n\n{prompt}" if system else prompt
            prompt = [{"role": "user", "content": prompt}]
        elif self._data.raw:
            raise InputError("prompt: expected text with data.raw, got messages; set it to false")
        if system and prompt[0]["role"] == "system":
            raise InputError(
                "prompt begins with a system message and data.system_prompt is set; remove one "
                "of them"
            )
        return [{"role": "system", "content": system}, *prompt] if system else prompt

    def _check_rows(self, source: _Epochs, max_response_tokens: int, max_model_len: int) -> None:
        limit = max_model_len - max_response_tokens
        problems = self._rendered_rows(source.rows)
        for row in self._rows_to_tokenize(source.rows, limit):
            try:
                _, token_ids = self._encode(row)
                if len(token_ids) > limit:
                    raise InputError(
                        f"expected at most {limit} prompt tokens (context {max_model_len} less "
                        f"rollout.max_response_tokens {max_response_tokens}), got "
                        f"{len(token_ids)}; shorten or drop the row, lower "
                        "rollout.max_response_tokens or raise rollout.max_model_len"
                    )
            except InputError as error:
                what = str(error).removeprefix(f"{row.where}: ")
                problems.append(f"{row.where}: {what}")
        raise_problems(source.prompts, problems)

    def _rows_to_tokenize(self, rows: Rows, limit: int) -> Iterator[Row]:
        """Rows to tokenize at the start: all of a small source.

        Of a large source those that may have more than ``limit`` tokens, and one row for each
        sequence of roles, to see that the template takes it.
        """
        if len(rows) <= _TOKENIZE_ALL_UP_TO:
            yield from rows
            return
        table = rows.table
        # A token is at least one byte. The template and the system prompt add their own bytes.
        overhead = 0
        for kind in pc.unique(table["kind"]):
            row = rows[pc.index(table["kind"], kind).as_py()]
            yield row
            text = self._tokenizer.render(self._with_system_prompt(row.prompt))
            prompt = row.prompt
            if not isinstance(prompt, str):
                prompt = "".join(message["content"] for message in prompt)
            overhead = max(overhead, len(text.encode()) - len(prompt.encode()))
        longest = limit - overhead - _EXTRA_TOKENS
        for index in pc.indices_nonzero(pc.greater(pc.binary_length(table["prompt"]), longest)):
            yield rows[index.as_py()]

    def _rendered_rows(self, rows: Rows) -> list[str]:
        """Mistakes: text that the chat template wrote. The template would be applied twice."""
        if self._data.raw or not self._tokenizer.has_chat_template:
            return []
        rendered = self._tokenizer.render([{"role": "user", "content": "x"}])
        opening = rendered.partition("user")[0].strip()
        if not opening:
            return []
        contain = pc.match_substring(rows.table["prompt"], opening)
        found = pc.and_(pc.invert(rows.table["is_chat"]), contain)
        what = (
            f"prompt: expected text without the chat template, got {opening!r} in it; set data.raw "
            "to true for prompts that are rendered already"
        )
        numbers = rows.table["number"].filter(found).to_pylist()
        return [f"{rows.where(number)}: {what}" for number in numbers]


def _changed(what: str, expected: Any, got: Any) -> InputError:
    return InputError(
        f"data: cannot resume, the {what} changed since the checkpoint: expected {expected}, got "
        f"{got}; restore the prompts and settings of the first run, or start a new one"
    )


def _within(rows: Rows, limits: Sequence[float]) -> np.ndarray:
    """Indices (int32) of the rows whose pass rate is within ``limits`` or unknown."""
    if not limits:
        return np.arange(len(rows), dtype=np.int32)
    rate = rows.table["pass_rate"]
    inside = pc.and_(pc.greater_equal(rate, limits[0]), pc.less_equal(rate, limits[1]))
    return pc.indices_nonzero(pc.fill_null(inside, True)).to_numpy().astype(np.int32)


def _fingerprint(rows: Rows, kept: np.ndarray) -> str:
    """SHA-256 over ids, prompts with their roles, answers, and which rows are kept."""
    digest = hashlib.sha256(kept.tobytes() if len(kept) < len(rows) else b"")
    for name in ("id", "prompt", "kind", "answer"):
        for chunk in rows.table[name].chunks:
            for buffer in chunk.buffers():
                digest.update(b"" if buffer is None else buffer)
    return digest.hexdigest()
