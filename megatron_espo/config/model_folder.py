"""Is the model folder whole? Names, sizes and headers only. Standard library only."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_espo.config.schema import Config

# One of these sets of files makes a tokenizer.
TOKENIZER_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
NO_HUB = (
    "models are never looked up on a hub; download it once where there is a network "
    "(`hf download <owner>/<name> --local-dir <folder>`) and give the folder (relative to the current directory)"
)
INDEX = "model.safetensors.index.json"


def problems(config: "Config") -> Iterator[tuple[str, str]]:
    """``(key, message)`` for what is missing or damaged in ``model.path`` and ``model.tokenizer``."""
    folder = Path(config.model.path)
    if not folder.is_dir():
        found = "a file" if folder.is_file() else "nothing"
        yield "model.path", f'expected a model folder, found {found} at "{folder}" (in {os.getcwd()}); {NO_HUB}'
        return
    if not (folder / "config.json").is_file():
        yield "model.path", f'expected config.json in "{folder}", found none; {NO_HUB}'
    yield from (("model.path", message) for message in _weight_problems(folder))
    tokenizer = Path(config.model.tokenizer or config.model.path)
    key = "model.tokenizer" if config.model.tokenizer else "model.path"
    is_file_set = any(all((tokenizer / name).is_file() for name in names) for names in TOKENIZER_FILES)
    if not is_file_set and not (tokenizer.is_file() and tokenizer.suffix == ".model"):
        yield (
            key,
            f'expected tokenizer files in "{tokenizer}" ({" or ".join(" + ".join(n) for n in TOKENIZER_FILES)}), '
            "found none; set model.tokenizer to a folder that has them, or to a SentencePiece *.model file",
        )


def _weight_problems(folder: Path) -> Iterator[str]:
    found, index = {file.name for file in folder.glob("*.safetensors")}, folder / INDEX
    if index.is_file():
        try:
            wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            yield f"expected a JSON object with weight_map in {index}, got {error!r}; fetch it again"
            return
        missing = sorted(wanted - found)
        if missing:
            yield f'expected the {len(wanted)} files of {INDEX} in "{folder}", found {len(wanted) - len(missing)}; {missing[0]} is missing: fetch it again'
        found &= wanted
    elif not found:
        yield (
            f'expected *.safetensors in "{folder}", found none; other formats are converted by '
            "`AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)`"
        )
    for name in sorted(found):
        if problem := _damage(folder / name):
            yield problem


def _damage(file: Path) -> str | None:
    """What is wrong with a safetensors file's length: eight bytes (the header's length), the header, the tensors."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            return f"expected weights in {file}, found a Git LFS pointer; run `git lfs pull` there"
        length = int.from_bytes(start, "little")
        try:
            header = json.loads(stream.read(length) if length < size else b"")
            tensors = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"expected a safetensors file, got {size} bytes without its header: {file}; fetch it again"
    expected = 8 + length + max(tensors, default=0)
    if size != expected:
        return f"expected {expected} bytes, as its header says, got {size}: {file}; fetch it again"
    return None
