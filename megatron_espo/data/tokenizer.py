"""The trainer's tokenizer: a Hugging Face folder or a bare SentencePiece model, from local files only."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_espo.errors import InputError

Messages = list[dict[str, str]]
HF_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer.

    Attributes:
        eos_ids: ids that end a response; the union of what the model folder and the tokenizer declare, never empty.
        vocab_size: true vocabulary of the model (``vocab_size`` of its ``config.json``), or of the tokenizer where no
            ``config.json`` is there. No padding for tensor parallelism.
        has_chat_template: whether a list of messages can be encoded.
    """

    eos_ids: frozenset[int]
    vocab_size: int
    has_chat_template: bool

    def render(self, prompt: str | Messages) -> str:
        """Text the model reads: messages through the chat template with the assistant's turn opened, text as it is."""

    def encode_prompt(self, prompt: str | Messages) -> list[int]:
        """Token ids of ``render(prompt)``; plain text gets the beginning-of-sequence token that the model expects."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens."""


def load_tokenizer(path: str | Path, model_path: str | Path | None = None) -> Tokenizer:
    """Load the tokenizer at ``path``. Never asks a hub.

    Args:
        path: a Hugging Face tokenizer folder, a SentencePiece model file, or a folder whose only tokenizer is one.
        model_path: folder with the model's ``config.json`` and ``generation_config.json`` where it is not ``path``.

    Raises:
        InputError: nothing there, files missing or unreadable, several candidates, or no end-of-sequence token.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(
            f"tokenizer: {path} does not exist (looked for {path.absolute()}); expected a local Hugging Face folder or"
            " a SentencePiece .model file; hub names are not looked up, download the model first"
        )
    folder = Path(model_path) if model_path is not None else (path if path.is_dir() else path.parent)
    configs = [_read_json(folder / name) for name in ("generation_config.json", "config.json")]
    vocab_size = _text_config(configs[1]).get("vocab_size")
    eos_ids = _declared_eos(configs[0]) | _declared_eos(configs[1]) | _declared_eos(_text_config(configs[1]))

    if path.is_dir() and any((path / name).is_file() for name in HF_FILES):
        return HuggingFaceTokenizer(path, eos_ids, vocab_size)
    return SentencePieceTokenizer(_find_sentencepiece(path), eos_ids, vocab_size)


class HuggingFaceTokenizer:
    """A :class:`Tokenizer` over transformers' ``AutoTokenizer``."""

    def __init__(self, folder: Path, eos_ids: frozenset[int], vocab_size: int | None):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is first imported
        from transformers import AutoTokenizer

        try:
            # trust_remote_code=False refuses at once; left out, transformers asks on standard input.
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises whatever the broken file led it to
            raise InputError(
                f"tokenizer: expected files in {folder} that transformers can load, got {type(error).__name__}: {error}; fetch them again"
            ) from error
        own = self._tokenizer.eos_token_id
        self.vocab_size = vocab_size or len(self._tokenizer)
        self.eos_ids = _require_eos(eos_ids | (frozenset() if own is None else {own}), self.vocab_size, folder)
        self.has_chat_template = bool(self._tokenizer.chat_template)

    def render(self, prompt: str | Messages) -> str:
        if isinstance(prompt, str):
            return prompt
        if not self.has_chat_template:
            raise InputError("tokenizer: chat messages need a chat template and this tokenizer has none; use text")
        try:
            return self._tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise jinja errors for roles that they refuse
            raise InputError(f"tokenizer: the chat template refused the messages: {error}") from error

    def encode_prompt(self, prompt: str | Messages) -> list[int]:
        # A template writes its own special tokens; adding them again would double the beginning of sequence.
        text = self.render(prompt)
        return list(self._tokenizer.encode(text, add_special_tokens=isinstance(prompt, str)))

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


class SentencePieceTokenizer:
    """A :class:`Tokenizer` over one SentencePiece model file; it has no chat template."""

    has_chat_template = False

    def __init__(self, file: Path, eos_ids: frozenset[int], vocab_size: int | None):
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(file.read_bytes())
        except (RuntimeError, OSError) as error:
            raise InputError(f"tokenizer: {file} is not a readable SentencePiece model: {error}") from error
        own, bos = self._processor.eos_id(), self._processor.bos_id()
        self._prefix = [bos] if bos >= 0 else []
        self.vocab_size = vocab_size or self._processor.vocab_size()
        self.eos_ids = _require_eos(eos_ids | ({own} if own >= 0 else frozenset()), self.vocab_size, file)

    def render(self, prompt: str | Messages) -> str:
        if not isinstance(prompt, str):
            raise InputError("tokenizer: a bare SentencePiece model has no chat template; use text instead of messages")
        return prompt

    def encode_prompt(self, prompt: str | Messages) -> list[int]:
        return self._prefix + self._processor.encode(self.render(prompt))

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        # The model's vocabulary may be larger than the tokenizer's; sentencepiece raises on ids it does not know.
        known = self._processor.vocab_size()
        return self._processor.decode([int(i) for i in ids if i < known])


def _find_sentencepiece(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(file for file in path.glob("*.model*") if file.is_file())
    if len(found) != 1:
        got = ", ".join(file.name for file in found) or "none of them"
        raise InputError(
            f"tokenizer: {path} holds no tokenizer that can be told; expected one of {', '.join(HF_FILES)}, or exactly"
            f" one SentencePiece *.model file; got {got}"
        )
    return found[0]


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of ``config``: multimodal models nest it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) and "vocab_size" not in config else config


def _declared_eos(config: dict[str, Any]) -> frozenset[int]:
    declared = config.get("eos_token_id")
    if declared is None:
        return frozenset()
    return frozenset(declared if isinstance(declared, list) else [declared])


def _require_eos(eos_ids: frozenset[int], vocab_size: int, where: Path) -> frozenset[int]:
    if not eos_ids:
        raise InputError(
            f"tokenizer: {where} declares no end-of-sequence token, so no response would ever end;"
            " set eos_token_id in the model folder's generation_config.json"
        )
    if max(eos_ids) >= vocab_size:
        raise InputError(
            f"tokenizer: expected end-of-sequence ids below {vocab_size}, the model's vocab_size, got {max(eos_ids)} for {where};"
            " is the tokenizer another model's?"
        )
    return eos_ids
