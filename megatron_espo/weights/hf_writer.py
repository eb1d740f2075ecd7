"""Write a Hugging Face folder and rename it into place when it is complete."""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file

from megatron_espo.config.model_folder import INDEX
from megatron_espo.errors import InputError
from megatron_espo.files import make_durable
from megatron_espo.weights.source import ParameterMetadata

MODEL_FILES = ("config.json", "generation_config.json", "LICENSE*")
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template*", "*.model",
)  # fmt: skip


def write_folder(
    metadata: list[ParameterMetadata],
    stream: Iterator[tuple[str, Any]],
    out_dir: Path,
    source_dir: Path,
    dtype: torch.dtype,
    max_file_bytes: int,
    tokenizer: str | None = None,
) -> None:
    """Write a stream of tensors as a Hugging Face folder.

    All files are written to ``<out_dir>.partial``, which then replaces ``out_dir`` by a rename.

    Args:
        metadata: what the stream yields, in order.
        source_dir: folder with configuration (its dtype becomes ``dtype``) and tokenizer to copy.
        tokenizer: folder or SentencePiece file of the tokenizer, if it is not ``source_dir``.
        max_file_bytes: limit of a weight file and of host memory; a single tensor may exceed it.

    Raises:
        InputError: ``out_dir`` exists and is not an earlier export.
    """
    is_export = (out_dir / "config.json").exists()
    is_empty = not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir()))
    if not is_export and not is_empty:
        raise InputError(
            f"{out_dir}: expected nothing or an earlier export, got something else; choose another "
            "folder"
        )
    partial, old = (out_dir.with_name(out_dir.name + end) for end in (".partial", ".old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _copy_metadata_files(source_dir, Path(tokenizer or source_dir), partial, dtype)
        _write_tensors(metadata, stream, partial, max_file_bytes)
        make_durable(*partial.iterdir(), partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if out_dir.exists():
        out_dir.rename(old)
    partial.rename(out_dir)
    shutil.rmtree(old, ignore_errors=True)


def _write_tensors(
    metadata: list[ParameterMetadata],
    stream: Iterator[tuple[str, Any]],
    folder: Path,
    max_file_bytes: int,
) -> None:
    split = split_state_dict_into_shards_factory(
        {item.name: item for item in metadata},
        get_storage_size=lambda item: torch.Size(item.shape).numel() * item.dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_file_bytes,
    )
    pending: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in stream:
        file = split.tensor_to_filename[name]
        pending[file][name] = tensor.to("cpu", copy=True)
        if len(pending[file]) == len(split.filename_to_tensors[file]):
            save_file(pending.pop(file), folder / file, metadata={"format": "pt"})
            # safetensors makes files that only their owner can read.
            (folder / file).chmod((folder / "config.json").stat().st_mode)
    assert not pending, pending.keys()
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_metadata_files(
    source_dir: Path, tokenizer: Path, target: Path, dtype: torch.dtype
) -> None:
    found = [file for pattern in MODEL_FILES for file in source_dir.glob(pattern)]
    found += [file for pattern in TOKENIZER_FILES for file in tokenizer.glob(pattern)]
    for file in found:
        if file.is_file():
            shutil.copyfile(file, target / file.name)
    if tokenizer.is_file():
        shutil.copyfile(tokenizer, target / "tokenizer.model")
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
