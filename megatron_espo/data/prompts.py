"""The endless, resumable stream of prompts."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from megatron_espo.config import Data
from megatron_espo.data.sources import Problems, Row, read_rows
from megatron_espo.data.tokenizer import Messages, Tokenizer
from megatron_espo.errors import InputError
from megatron_espo.types import Prompt


class PromptStream:
    """Endless prompts, every row exactly once per epoch, in an order that depends only on ``(seed, epoch)``.

    All rows are read, rendered and measured on construction, so a bad row stops the run before any model is loaded.
    One ``take`` may reach over the end of an epoch and then hold a row twice.

    Args:
        data: the ``data`` section of the configuration.
        tokenizer: the trainer's tokenizer.
        seed: of the order, and of a reasoning-gym task without a seed of its own.
        max_response_tokens: tokens that a response may take.
        max_model_len: the context of the rollout engine, prompt and response together.

    Attributes:
        epoch: passes over all rows completed so far.

    Raises:
        InputError: malformed rows, rows whose prompt and response do not fit the context, or that cannot be rendered.
    """

    def __init__(
        self, data: Data, tokenizer: Tokenizer, seed: int, *, max_response_tokens: int, max_model_len: int
    ):
        self._tokenizer, self._system_prompt = tokenizer, data.system_prompt
        self._seed, self._shuffle = seed, data.shuffle
        self._source = data.prompts
        self._rows = read_rows(data.prompts, data.task_args, seed)
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
            prompts.append(self._make_prompt(self._rows[self._order[self._position]]))
            self._position += 1
            if self._position == len(self._rows):
                self._start_epoch(self.epoch + 1)
        return prompts

    def find(self, ids: Sequence[str]) -> list[Prompt]:
        """Prompts by the ids of their rows; the stream does not move."""
        if not ids:
            return []
        rows = {row.id: row for row in self._rows}
        return [self._make_prompt(rows[name]) for name in ids]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as plain JSON values."""
        order = {"seed": self._seed, "shuffle": self._shuffle, "fingerprint": self._fingerprint}
        return {"epoch": self.epoch, "position": self._position} | order

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken: the next ``take`` gives what it would have given there.

        Raises:
            InputError: the state belongs to other rows or to another order.
        """
        own = self.state_dict()
        for name, meaning in (("fingerprint", f"rows of {self._source}"), ("seed", "seed"), ("shuffle", "shuffle")):
            if state[name] != own[name]:
                raise InputError(
                    f"data: cannot resume, the {meaning} changed since the checkpoint: expected {state[name]},"
                    f" got {own[name]}; restore the prompts and settings of the first run, or start a new one"
                )
        self._start_epoch(state["epoch"])
        self._position = state["position"]

    def _start_epoch(self, epoch: int) -> None:
        self.epoch, self._position = epoch, 0
        self._order = list(range(len(self._rows)))
        if self._shuffle:
            # Sorting by a hash, unlike random.shuffle, gives the same order in every Python version.
            key = f"{self._seed}/{epoch}/"
            self._order.sort(key=lambda index: hashlib.blake2b(f"{key}{index}".encode()).digest())

    def _make_prompt(self, row: Row) -> Prompt:
        prompt = self._with_system_prompt(row)
        token_ids = tuple(self._tokenizer.encode_prompt(prompt))
        return Prompt(row.id, self._tokenizer.render(prompt), row.answer, token_ids, row.metadata)

    def _with_system_prompt(self, row: Row) -> str | Messages:
        system, prompt = self._system_prompt, row.prompt
        if isinstance(prompt, str):
            if not self._tokenizer.has_chat_template:
                return f"{system}\n\n{prompt}" if system else prompt
            prompt = [{"role": "user", "content": prompt}]
        if system and prompt[0]["role"] == "system":
            raise InputError("prompt begins with a system message and data.system_prompt is set; remove one of them")
        return [{"role": "system", "content": system}, *prompt] if system else prompt

    def _check_rows(self, max_response_tokens: int, max_model_len: int) -> None:
        problems = Problems()
        for row in self._rows:
            try:
                token_ids = self._tokenizer.encode_prompt(self._with_system_prompt(row))
            except InputError as error:
                problems.add(row.where, str(error))
                continue
            if not token_ids or max(token_ids) >= self._tokenizer.vocab_size:
                got = f"id {max(token_ids)}" if token_ids else "none"
                problems.add(row.where, f"expected token ids below {self._tokenizer.vocab_size}, the model's vocab_size, got {got}; is the tokenizer another model's?")
            elif len(token_ids) + max_response_tokens > max_model_len:
                problems.add(
                    row.where,
                    f"expected at most {max_model_len - max_response_tokens} prompt tokens (context {max_model_len} less"
                    f" rollout.max_response_tokens {max_response_tokens}), got {len(token_ids)}; shorten or drop the"
                    " row, lower rollout.max_response_tokens or raise rollout.max_model_len",
                )
        problems.raise_if_any(self._source)


def _fingerprint(rows: list[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.id, row.prompt, row.answer], default=str).encode())
    return digest.hexdigest()
