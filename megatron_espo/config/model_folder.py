"""Checks that a model folder is complete, by names, sizes and headers. Standard library only."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_espo.config.rules import Problems
from megatron_espo.errors import InputError
from megatron_espo.files import safetensors_header
from megatron_espo.models.spec import ExternalSpec, ModelSpec, is_unused

# Each entry is a set of files that makes a tokenizer.
TOKENIZER_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
NO_HUB = (
    "nothing is downloaded; run `hf download <owner>/<name> --local-dir <folder>` once and set "
    "model.path to that folder"
)
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER = "adapter_config.json"
OWN_HEAD = (
    "{folder}: config.json has tie_word_embeddings true, but lm_head.weight differs from "
    "model.embed_tokens.weight; set tie_word_embeddings to false in config.json to use both, or "
    "remove lm_head.weight"
)


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
    yield from (("model.path", message) for message in weight_problems(folder))
    source = Path(tokenizer or model)
    if source.is_file() and source.suffix == ".model":
        return
    if not any(all((source / name).is_file() for name in names) for names in TOKENIZER_FILES):
        files = " or ".join(" + ".join(names) for names in TOKENIZER_FILES)
        advice = "set model.tokenizer to a folder with them or to a SentencePiece *.model file"
        key = "model.tokenizer" if tokenizer else "model.path"
        yield key, f'expected tokenizer files in "{source}" ({files}), found none; {advice}'


def weight_problems(folder: Path) -> Iterator[str]:
    """Yield a message for every missing or damaged weight file. Reads headers only."""
    if (folder / ADAPTER).is_file():
        advice = "merge it into its base model (peft: merge_and_unload, then save_pretrained)"
        yield f'expected a whole model in "{folder}", found an adapter ({ADAPTER}); {advice}'
        return
    found, wanted = {file.name for file in folder.glob("*.safetensors")}, {SINGLE}
    index = folder / INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            wanted = {str(name) for name in weight_map.values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            expected = f"a JSON object with weight_map in {index}"
            yield f"expected {expected}, got {error!r}; fetch it again"
            return
        if missing := sorted(wanted - found):
            expected = f'the {len(wanted)} files of {INDEX} in "{folder}"'
            found_text = f"{len(wanted) - len(missing)}, without {missing[0]}"
            yield f"expected {expected}, found {found_text}; fetch it again"
        if SINGLE in found - wanted:
            both = f"{SINGLE} and the files of {INDEX}"
            yield f'expected one set of weights in "{folder}", found {both}; remove one of them'
    elif SINGLE not in found:
        advice = "`AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)` writes one"
        got = ", ".join(sorted(found)[:3]) or "none"
        yield f'expected {SINGLE} or {INDEX} in "{folder}", found {got}; {advice}'
        return
    for name in sorted(found & wanted):
        try:
            safetensors_header(folder / name)
        except InputError as error:
            yield str(error)


def tensor_problems(folder: Path, spec: ModelSpec) -> Iterator[str]:
    """Yield a message for the first missing, unknown, misshapen or non-float tensor.

    Reads headers only. The folder has no problem of :func:`problems`.

    Raises:
        InputError: no table for the model's family.
    """
    if isinstance(spec, ExternalSpec):  # its library checks them
        return
    shapes = spec.tensor_shapes
    file_of, entries = stored_tensors(folder)
    config = folder / "config.json"
    if missing := sorted(shapes.keys() - entries.keys()):
        whole = folder / INDEX if (folder / INDEX).is_file() else folder / SINGLE
        where = file_of.get(missing[0], whole)
        yield (
            f"{where}: expected tensor {missing[0]} ({len(missing)} are missing); the file is "
            f"incomplete, or {config} belongs to another model"
        )
    others = entries.keys() - shapes.keys()
    if unknown := sorted(name for name in others if not is_unused(spec.hf_config, name)):
        yield (
            f"{file_of[unknown[0]]}: expected no tensor {unknown[0]} for {config} ({len(unknown)} "
            "have no place in the model and would be lost); use a folder of this model only"
        )
    for name, shape in shapes.items():
        entry = entries.get(name, {"shape": shape, "dtype": "F32"})
        if (stored := tuple(entry["shape"])) != shape:
            yield f"{file_of[name]}: {name}: expected shape {shape} for {config}, got {stored}"
            return
        if entry["dtype"] not in ("F64", "F32", "F16", "BF16"):
            got = f"{entry['dtype']}; use the bfloat16 model"
            yield f"{file_of[name]}: {name}: expected floats of 16 bits or more, got {got}"
            return
    if "lm_head.weight" in others and not unknown and not _begin_alike(file_of, entries):
        yield OWN_HEAD.format(folder=folder)


def stored_tensors(folder: Path) -> tuple[dict[str, Path], dict[str, dict[str, Any]]]:
    """File and header entry of each tensor. A tensor that only the index names has no entry."""
    index = folder / INDEX
    if not index.is_file():
        entries = safetensors_header(folder / SINGLE)
        return dict.fromkeys(entries, folder / SINGLE), entries
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    headers = {file: safetensors_header(folder / file) for file in set(weight_map.values())}
    entries = {n: headers[file][n] for n, file in weight_map.items() if n in headers[file]}
    return {name: folder / file for name, file in weight_map.items()}, entries


def _begin_alike(file_of: dict[str, Path], entries: dict[str, dict[str, Any]]) -> bool:
    """Whether output layer and embedding begin with the same bytes. Loading compares the rest."""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    if len({entries[name]["dtype"] for name in names}) > 1:
        return True
    begins = []
    for name in names:
        first, end = entries[name]["data_offsets"]
        with file_of[name].open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            stream.seek(8 + length + first)
            begins.append(stream.read(min(end - first, 1 << 20)))
    return begins[0] == begins[1]
