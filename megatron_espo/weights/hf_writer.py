"""Writing a Hugging Face folder so that a reader never sees half of one."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_espo.errors import InputError
from megatron_espo.run_files import make_durable
from megatron_espo.weights.hf_reader import INDEX_NAME, SINGLE_NAME
from megatron_espo.weights.source import ParameterMetadata

COPIED_FILES = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template*", "*.model", "LICENSE*",
)  # fmt: skip


def write_folder(
    metadata: list[ParameterMetadata],
    stream: Iterator[tuple[str, torch.Tensor]],
    out_dir: Path,
    source_dir: Path,
    dtype: torch.dtype,
    max_file_bytes: int,
) -> None:
    """Write a stream of tensors as a Hugging Face folder: all files aside, then into place by a rename.

    Args:
        metadata: what the stream yields, in its order.
        source_dir: folder that configuration (its dtype becomes ``dtype``) and tokenizer are copied from.
        max_file_bytes: limit of a weight file, and of what is held in host memory; one tensor may exceed it.

    Raises:
        InputError: ``out_dir`` exists and is not an earlier export.
    """
    if out_dir.exists() and not (out_dir / "config.json").exists() and (out_dir.is_file() or any(out_dir.iterdir())):
        raise InputError(f"{out_dir}: expected nothing or an earlier export, got something else; choose another folder")
    partial = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _copy_metadata_files(source_dir, partial, dtype)
    files = _plan_files(metadata, max_file_bytes)
    for file, names in files.items():
        tensors = {}
        for expected in names:
            name, tensor = next(stream)
            assert name == expected, (name, expected)
            tensors[name] = tensor.to("cpu", copy=True)
        save_file(tensors, partial / file, metadata={"format": "pt"})
    if len(files) > 1:
        total = sum(map(_bytes, metadata))
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (partial / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
    _replace(partial, out_dir)


def _plan_files(metadata: list[ParameterMetadata], max_file_bytes: int) -> dict[str, list[str]]:
    """File name -> tensor names, in stream order, each file as full as the limit allows."""
    files: list[list[str]] = [[]]
    size = 0
    for item in metadata:
        if files[-1] and size + _bytes(item) > max_file_bytes:
            files.append([])
            size = 0
        files[-1].append(item.name)
        size += _bytes(item)
    if len(files) == 1:
        return {SINGLE_NAME: files[0]}
    return {f"model-{i:05}-of-{len(files):05}.safetensors": names for i, names in enumerate(files, start=1)}


def _bytes(item: ParameterMetadata) -> int:
    return torch.Size(item.shape).numel() * item.dtype.itemsize


def _copy_metadata_files(source_dir: Path, target: Path, dtype: torch.dtype) -> None:
    for pattern in COPIED_FILES:
        for file in source_dir.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
    config = json.loads((target / "config.json").read_text())
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _replace(partial: Path, out_dir: Path) -> None:
    """Make what was written durable, then rename it into place."""
    make_durable(*partial.iterdir(), partial)
    old = out_dir.with_name(out_dir.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out_dir.exists():
        out_dir.rename(old)
    partial.rename(out_dir)
    shutil.rmtree(old, ignore_errors=True)
