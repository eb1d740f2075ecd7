"""The endless, resumable stream of prompts."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc

from megatron_espo.config import Data
from megatron_espo.data.sources import Problems, Row, Rows, read_rows
from megatron_espo.data.tokenizer import Messages, Tokenizer
from megatron_espo.errors import InputError
from megatron_espo.types import Prompt

# Of a larger source only rows that could be too long are tokenized at the start.
_TOKENIZE_ALL_UP_TO = 20_000
# Tokens of a prompt beyond the bytes of its text: a beginning of sequence, a prefix blank.
_EXTRA_TOKENS = 8


class PromptStream:
    """Endless prompts, every row once per epoch, in an order of ``(seed, epoch)`` only.

    All rows are read and checked on construction, so a bad row stops the run before any model is
    loaded. Prompts are rendered and tokenized when they are taken. One ``take`` may reach over the
    end of an epoch and then hold a row twice.

    Args:
        data: the ``data`` section of the configuration.
        tokenizer: the trainer's tokenizer.
        seed: of the order, and of a reasoning-gym task without a seed of its own.
        max_response_tokens: tokens that a response may take.
        max_model_len: the context of the rollout engine, prompt and response together.

    Attributes:
        epoch: passes over all rows completed so far.

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
        self._tokenizer, self._data, self._seed = tokenizer, data, seed
        self._rows = read_rows(data.prompts, data.task_args, seed, data.columns)
        self._check_rows(max_response_tokens, max_model_len)
        self._fingerprint = _fingerprint(self._rows)
        self._start_epoch(0)

    def __len__(self) -> int:
        """Rows in one epoch."""
        return len(self._rows)

    def take(self, n: int) -> list[Prompt]:
        """The next ``n`` prompts."""
        prompts = []
        for _ in range(n):
            prompts.append(self._make_prompt(self._rows[int(self._order[self._position])]))
            self._position += 1
            if self._position == len(self._rows):
                self._start_epoch(self.epoch + 1)
        return prompts

    def find(self, ids: Sequence[str]) -> list[Prompt]:
        """Prompts by the ids of their rows; the stream does not move."""
        return [self._make_prompt(self._rows[self._rows.find(name)]) for name in ids]

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream, as plain JSON values."""
        order = {
            "seed": self._seed,
            "shuffle": self._data.shuffle,
            "fingerprint": self._fingerprint,
        }
        return {"epoch": self.epoch, "position": self._position} | order

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at ``state``: the next ``take`` gives what it would have given there.

        Raises:
            InputError: the state belongs to other rows or to another order.
        """
        own = self.state_dict()
        for name, meaning in (
            ("fingerprint", f"rows of {self._data.prompts}"),
            ("seed", "seed"),
            ("shuffle", "shuffle"),
        ):
            if state[name] != own[name]:
                raise InputError(
                    f"data: cannot resume, the {meaning} changed since the checkpoint: expected "
                    f"{state[name]}, got {own[name]}; restore the prompts and settings of the "
                    "first run, or start a new one"
                )
        self._start_epoch(state["epoch"])
        self._position = state["position"]

    def _start_epoch(self, epoch: int) -> None:
        self.epoch, self._position = epoch, 0
        order = list(range(len(self._rows)))
        if self._data.shuffle:
            # Sorting by a hash gives the same order in every Python version.
            key = f"{self._seed}/{epoch}/"
            order.sort(key=lambda index: hashlib.blake2b(f"{key}{index}".encode()).digest())
        self._order = np.array(order, np.int32)

    def _make_prompt(self, row: Row) -> Prompt:
        prompt = self._with_system_prompt(row.prompt)
        token_ids = tuple(self._encode(prompt))
        self._check_ids(row.where, token_ids)
        return Prompt(row.id, self._tokenizer.render(prompt), row.answer, token_ids, row.metadata)

    def _encode(self, prompt: str | Messages) -> list[int]:
        if self._data.raw and isinstance(prompt, str):  # it has its own special tokens
            return self._tokenizer.encode(prompt)
        return self._tokenizer.encode_prompt(prompt)

    def _with_system_prompt(self, prompt: str | Messages) -> str | Messages:
        system = self._data.system_prompt
        if isinstance(prompt, str):
            if self._data.raw or not self._tokenizer.has_chat_template:
                return f"{system}\n\n{prompt}" if system else prompt
            prompt = [{"role": "user", "content": prompt}]
        elif self._data.raw:
            raise InputError(
                "prompt: expected text with data.raw, got messages; set data.raw to false"
            )
        if system and prompt[0]["role"] == "system":
            raise InputError(
                "prompt begins with a system message and data.system_prompt is set; remove one "
                "of them"
            )
        return [{"role": "system", "content": system}, *prompt] if system else prompt

    def _check_rows(self, max_response_tokens: int, max_model_len: int) -> None:
        problems, limit = Problems(), max_model_len - max_response_tokens
        self._check_not_rendered(problems)
        for row in self._rows_to_tokenize(limit):
            try:
                token_ids = self._encode(self._with_system_prompt(row.prompt))
                self._check_ids(row.where, token_ids)
            except InputError as error:
                problems.add(row.where, str(error).removeprefix(f"{row.where}: "))
                continue
            if len(token_ids) > limit:
                problems.add(
                    row.where,
                    f"expected at most {limit} prompt tokens (context {max_model_len} less "
                    f"rollout.max_response_tokens {max_response_tokens}), got {len(token_ids)}; "
                    "shorten or drop the row, lower rollout.max_response_tokens or raise "
                    "rollout.max_model_len",
                )
        problems.raise_if_any(self._data.prompts)

    def _rows_to_tokenize(self, limit: int) -> Iterator[Row]:
        """Rows to tokenize at the start: all of a small source.

        Of a large source those that may have more than ``limit`` tokens, and one row for each
        sequence of roles, to see that the template takes it.
        """
        rows = self._rows
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

    def _check_not_rendered(self, problems: Problems) -> None:
        """Refuse text that the chat template wrote: the template would be applied twice."""
        if self._data.raw or not self._tokenizer.has_chat_template:
            return
        rendered = self._tokenizer.render([{"role": "user", "content": "x"}])
        opening = rendered.partition("user")[0]
        if not opening.strip():
            return
        table = self._rows.table
        found = pc.and_(
            pc.invert(table["is_chat"]), pc.match_substring(table["prompt"], opening.strip())
        )
        for index in pc.indices_nonzero(found):
            problems.add(
                self._rows[index.as_py()].where,
                f"prompt: expected text without the chat template, got {opening.strip()!r} in it; "
                "set data.raw to true for prompts that are rendered already",
            )

    def _check_ids(self, where: str, token_ids: Sequence[int]) -> None:
        size = self._tokenizer.vocab_size
        if not token_ids or max(token_ids) >= size:
            got = f"id {max(token_ids)}" if token_ids else "none"
            raise InputError(
                f"{where}: expected token ids below {size}, the model's vocab_size, got {got}; is "
                "the tokenizer another model's?"
            )


def _fingerprint(rows: Rows) -> str:
    """SHA-256 over ids, prompts with their roles, and answers."""
    digest = hashlib.sha256()
    for name in ("id", "prompt", "kind", "answer"):
        for chunk in rows.table[name].chunks:
            for buffer in chunk.buffers():
                digest.update(b"" if buffer is None else buffer)
    return digest.hexdigest()
