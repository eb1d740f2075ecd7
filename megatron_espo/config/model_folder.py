"""Checks that a model folder is complete, by names, sizes and headers. Standard library only."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_espo.config.rules import Problems
from megatron_espo.errors import InputError
from megatron_espo.files import safetensors_header

# Each entry is a set of files that makes a tokenizer.
TOKENIZER_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
NO_HUB = (
    "nothing is downloaded; run `hf download <owner>/<name> --local-dir <folder>` once and set "
    "model.path to that folder"
)
INDEX = "model.safetensors.index.json"


def problems(model: str, tokenizer: str | None) -> Problems:
    """Yield ``(key, message)`` for every missing or damaged file of ``model.path`` and
    ``model.tokenizer``."""
    folder = Path(model)
    if not folder.is_dir():
        found = "a file" if folder.is_file() else "nothing"
        got = f'{found} at "{folder}" (in {os.getcwd()})'
        yield "model.path", f"expected a model folder, found {got}; {NO_HUB}"
        return
    if not (folder / "config.json").is_file():
        yield "model.path", f'expected config.json in "{folder}", found none; {NO_HUB}'
    yield from (("model.path", message) for message in _weight_problems(folder))
    source = Path(tokenizer or model)
    if source.is_file() and source.suffix == ".model":
        return
    if not any(all((source / name).is_file() for name in names) for names in TOKENIZER_FILES):
        files = " or ".join(" + ".join(names) for names in TOKENIZER_FILES)
        advice = "set model.tokenizer to a folder with them or to a SentencePiece *.model file"
        key = "model.tokenizer" if tokenizer else "model.path"
        yield key, f'expected tokenizer files in "{source}" ({files}), found none; {advice}'


def _weight_problems(folder: Path) -> Iterator[str]:
    found, index = {file.name for file in folder.glob("*.safetensors")}, folder / INDEX
    if index.is_file():
        try:
            wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            expected = f"a JSON object with weight_map in {index}"
            yield f"expected {expected}, got {error!r}; fetch it again"
            return
        if missing := sorted(wanted - found):
            expected = f'the {len(wanted)} files of {INDEX} in "{folder}"'
            found_text = f"{len(wanted) - len(missing)}, without {missing[0]}"
            yield f"expected {expected}, found {found_text}; fetch it again"
        found &= wanted
    elif not found:
        advice = (
            "`AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)` converts others"
        )
        yield f'expected *.safetensors in "{folder}", found none; {advice}'
    for name in sorted(found):
        try:
            safetensors_header(folder / name)
        except InputError as error:
            yield str(error)
