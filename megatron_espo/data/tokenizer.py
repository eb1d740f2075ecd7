"""The trainer's tokenizer: a Hugging Face folder or a bare SentencePiece model, from local files
only.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_espo.errors import InputError
from megatron_espo.files import read_object

Messages = list[dict[str, str]]
HF_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")


class _Tokenizer:
    """What both kinds of tokenizer share.

    Args:
        where: file or folder, for the errors.
        declared_eos: end-of-sequence ids that the model folder declares.
        own_eos: that of the tokenizer; ``None``: none.
        vocab_size: of the model (``vocab_size`` of its ``config.json``) without padding for tensor
            parallelism, or of the tokenizer if there is no ``config.json``.

    Attributes:
        eos_ids: ids that end a response. Never empty.
        has_chat_template: whether a list of messages can be encoded.

    Raises:
        InputError: no end-of-sequence id, or one outside the vocabulary.
    """

    has_chat_template = False

    def __init__(
        self, where: Path, declared_eos: frozenset[int], own_eos: int | None, vocab_size: int
    ) -> None:
        self.vocab_size = vocab_size
        self.eos_ids = declared_eos if own_eos is None else declared_eos | {own_eos}
        if not self.eos_ids:
            advice = "set eos_token_id in the model folder's generation_config.json"
            raise InputError(f"tokenizer: {where}: no end-of-sequence token; {advice}")
        if max(self.eos_ids) >= vocab_size:
            expected = f"end-of-sequence ids below {vocab_size}, the model's vocab_size"
            got = f"{max(self.eos_ids)}; is the tokenizer another model's?"
            raise InputError(f"tokenizer: {where}: expected {expected}, got {got}")

    def render(self, prompt: str | Messages) -> str:
        """The model's input as text: messages through the chat template with a generation prompt,
        text unchanged.
        """
        if not isinstance(prompt, str):
            raise InputError("tokenizer: chat messages need a chat template; got none")
        return prompt


class HuggingFaceTokenizer(_Tokenizer):
    """transformers' ``AutoTokenizer``."""

    def __init__(
        self,
        folder: Path,
        eos_ids: frozenset[int],
        vocab_size: int | None,
        template_args: Mapping[str, Any],
    ) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # huggingface_hub reads it when it is imported
        from transformers import AutoTokenizer

        try:
            # Without trust_remote_code=False transformers asks on standard input.
            self._tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers raises many types for a broken file
            raise InputError(
                f"tokenizer: expected files in {folder} that transformers can load, "
                f"got {type(error).__name__}: {error}; fetch them again"
            ) from error
        own_eos, size = self._tokenizer.eos_token_id, vocab_size or len(self._tokenizer)
        super().__init__(folder, eos_ids, own_eos, size)
        template = self._tokenizer.chat_template
        self.has_chat_template, self._template_args = bool(template), template_args
        unknown = [name for name in template_args if not re.search(rf"\b{name}\b", str(template))]
        if unknown:
            raise InputError(
                f"data.template_args: expected variables of the chat template in {folder}, "
                f"which has no {', '.join(unknown)}"
            )

    def render(self, prompt: str | Messages) -> str:
        if isinstance(prompt, str) or not self.has_chat_template:
            return super().render(prompt)
        try:
            options = {"tokenize": False, "add_generation_prompt": True, **self._template_args}
            return str(self._tokenizer.apply_chat_template(prompt, **options))
        except Exception as error:  # a template raises jinja errors
            message = f"tokenizer: the chat template rejected the messages: {error}"
            raise InputError(message) from error

    def encode_prompt(self, prompt: str | Messages) -> list[int]:
        """Token ids of ``render(prompt)``; plain text gets the beginning-of-sequence token that the
        model expects.
        """
        # A template writes its own special tokens.
        text, bos = self.render(prompt), self._tokenizer.bos_token_id
        ids = list(self._tokenizer.encode(text, add_special_tokens=isinstance(prompt, str)))
        # Rendered text may begin with the token that the tokenizer adds.
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, without special tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens."""
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(list(ids), **options))


class SentencePieceTokenizer(_Tokenizer):
    """One SentencePiece model file. It has no chat template."""

    def __init__(self, file: Path, eos_ids: frozenset[int], vocab_size: int | None):
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(file.read_bytes())
        except (RuntimeError, OSError) as error:
            message = f"tokenizer: {file} is not a readable SentencePiece model: {error}"
            raise InputError(message) from error
        eos, bos = self._processor.eos_id(), self._processor.bos_id()
        self._prefix = [bos] if bos >= 0 else []
        size = vocab_size or self._processor.vocab_size()
        super().__init__(file, eos_ids, eos if eos >= 0 else None, size)

    def encode_prompt(self, prompt: str | Messages) -> list[int]:
        return self._prefix + self._processor.encode(self.render(prompt))

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        # The vocabulary of the model may be larger. sentencepiece raises for unknown ids.
        known = self._processor.vocab_size()
        return self._processor.decode([int(i) for i in ids if i < known])


Tokenizer = HuggingFaceTokenizer | SentencePieceTokenizer


def load_tokenizer(
    path: str | Path,
    model_path: str | Path | None = None,
    template_args: Mapping[str, Any] | None = None,
) -> Tokenizer:
    """Load the tokenizer at ``path``. Never contacts a hub.

    Args:
        path: a Hugging Face tokenizer folder, a SentencePiece model file, or a folder whose only
            tokenizer is one.
        template_args: arguments of the chat template.
        model_path: folder with the model's ``config.json`` and ``generation_config.json`` if it is
            not ``path``.

    Raises:
        InputError: files are missing or unreadable, there are several candidates, or no
            end-of-sequence token.
    """
    path = Path(path)
    folder = Path(model_path or (path if path.is_dir() else path.parent))
    files = [folder / "generation_config.json", folder / "config.json"]
    generation, config = (read_object(file) if file.is_file() else {} for file in files)
    # Multimodal models nest the text model's values.
    own = {name: value for name, value in config.items() if value is not None}
    config = (config.get("text_config") or {}) | own
    vocab_size = config.get("vocab_size")
    # Like transformers and vLLM: config.json counts if generation_config.json names no token.
    eos_ids = _declared_eos(generation, files[0]) or _declared_eos(config, files[1])
    if path.is_dir() and any((path / name).is_file() for name in HF_FILES):
        return HuggingFaceTokenizer(path, eos_ids, vocab_size, template_args or {})
    if template_args:
        raise InputError(f"data.template_args: expected none, {path} has no chat template")
    return SentencePieceTokenizer(_find_sentencepiece(path), eos_ids, vocab_size)


def _find_sentencepiece(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(file for file in path.glob("*.model*") if file.is_file())
    if len(found) != 1:
        got = ", ".join(file.name for file in found) or "none of them"
        raise InputError(
            f"tokenizer: {path}: expected one of {', '.join(HF_FILES)}, "
            f"or exactly one SentencePiece *.model file; got {got}"
        )
    return found[0]


def _declared_eos(config: dict[str, Any], file: Path) -> frozenset[int]:
    declared = config.get("eos_token_id")
    ids = [i for i in (declared if isinstance(declared, list) else [declared]) if i is not None]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise InputError(f"{file}: eos_token_id: expected integers, got {declared!r}")
    return frozenset(i for i in ids if i >= 0)  # some folders write -1 for none
