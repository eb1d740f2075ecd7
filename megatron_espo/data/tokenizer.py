"""The trainer's tokenizer: a Hugging Face folder, from local files only."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_espo.errors import InputError
from megatron_espo.files import read_object

Messages = list[dict[str, str]]


class Tokenizer:
    """transformers' ``AutoTokenizer``.

    Args:
        folder: of the tokenizer.
        eos_ids: end-of-sequence ids that the model folder declares.
        vocab_size: of the model (``vocab_size`` of its ``config.json``) without padding for tensor
            parallelism; ``None``: of the tokenizer.
        template_args: arguments of the chat template.

    Attributes:
        eos_ids: ids that end a response, the tokenizer's own too. Never empty.
        has_chat_template: whether a list of messages can be encoded.

    Raises:
        InputError: files are missing or unreadable, a template argument that the template lacks,
            no end-of-sequence id, or one outside the vocabulary.
    """

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
        own_eos = self._tokenizer.eos_token_id
        self.vocab_size = vocab_size or len(self._tokenizer)
        self.eos_ids = eos_ids if own_eos is None else eos_ids | {own_eos}
        if not self.eos_ids:
            advice = "set eos_token_id in the model folder's generation_config.json"
            raise InputError(f"tokenizer: {folder}: no end-of-sequence token; {advice}")
        if max(self.eos_ids) >= self.vocab_size:
            expected = f"end-of-sequence ids below {self.vocab_size}, the model's vocab_size"
            got = f"{max(self.eos_ids)}; is the tokenizer another model's?"
            raise InputError(f"tokenizer: {folder}: expected {expected}, got {got}")
        template = self._tokenizer.chat_template
        self.has_chat_template, self._template_args = bool(template), template_args
        unknown = [name for name in template_args if not re.search(rf"\b{name}\b", str(template))]
        if unknown:
            raise InputError(
                f"data.template_args: expected variables of the chat template in {folder}, "
                f"which has no {', '.join(unknown)}"
            )

    def render(self, prompt: str | Messages) -> str:
        """The model's input as text: messages through the chat template with a generation prompt,
        text unchanged.
        """
        if isinstance(prompt, str):
            return prompt
        if not self.has_chat_template:
            raise InputError("tokenizer: chat messages need a chat template; got none")
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


def load_tokenizer(
    path: str | Path,
    model_path: str | Path | None = None,
    template_args: Mapping[str, Any] | None = None,
) -> Tokenizer:
    """Load the tokenizer at ``path``. Never contacts a hub.

    Args:
        path: a Hugging Face tokenizer folder.
        model_path: folder with the model's ``config.json`` and ``generation_config.json`` if it is
            not ``path``.
        template_args: arguments of the chat template.

    Raises:
        InputError: see :class:`Tokenizer`.
    """
    folder = Path(model_path or path)
    files = [folder / "generation_config.json", folder / "config.json"]
    generation, config = (read_object(file) if file.is_file() else {} for file in files)
    config = (config.get("text_config") or {}) | config  # multimodal models nest the text model's
    # Like transformers and vLLM: config.json counts if generation_config.json names no token.
    eos_ids = _declared_eos(generation, files[0]) or _declared_eos(config, files[1])
    return Tokenizer(Path(path), eos_ids, config.get("vocab_size"), template_args or {})


def _declared_eos(config: dict[str, Any], file: Path) -> frozenset[int]:
    declared = config.get("eos_token_id")
    ids = [i for i in (declared if isinstance(declared, list) else [declared]) if i is not None]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise InputError(f"{file}: eos_token_id: expected integers, got {declared!r}")
    return frozenset(i for i in ids if i >= 0)  # some folders write -1 for none
