"""Load a Hugging Face folder into a Megatron model, and export a model to such a folder."""

from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from megatron_espo.config.model_folder import (
    OWN_HEAD,
    stored_tensors,
    tensor_problems,
    weight_problems,
)
from megatron_espo.distributed.collectives import first_not_none
from megatron_espo.errors import InputError
from megatron_espo.models.layouts import shard_into
from megatron_espo.models.spec import ExternalSpec, ModelSpec
from megatron_espo.weights.binding import ShardRanks, bind
from megatron_espo.weights.exporter import ExportedWeightSource
from megatron_espo.weights.hf_writer import write_folder
from megatron_espo.weights.source import WeightGatherer

_ROWS = 4096  # of the vocabulary, read at a time


class CheckpointFolder:
    """The tensors of ``model.safetensors``, or of the files in ``model.safetensors.index.json``.

    Only headers are read until a slice is indexed; then only the bytes of that slice.

    Attributes:
        names: the names of all tensors.

    Raises:
        InputError: no weights, or an unreadable file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        for problem in weight_problems(self.path):
            raise InputError(problem)
        self._file_of, _ = stored_tensors(self.path)
        self._open = lru_cache(None)(lambda file: safe_open(file, framework="pt"))
        self.names = frozenset(self._file_of)

    def get_slice(self, name: str) -> Any:
        """Return safetensors' lazy slice of a tensor."""
        return self._open(self._file_of[name]).get_slice(name)


def open_checkpoint(spec: ModelSpec, path: str | Path) -> CheckpointFolder:
    """Open a Hugging Face folder and check its tensors. Reads headers only.

    Raises:
        InputError: an unreadable file, or a missing, unknown or misshapen tensor.
    """
    folder = CheckpointFolder(path)
    for problem in tensor_problems(folder.path, spec):
        raise InputError(problem)
    if spec.tie_word_embeddings and "lm_head.weight" in folder.names:
        _check_tied_head(folder, spec.vocab_size)
    return folder


def _check_tied_head(folder: CheckpointFolder, vocab_size: int) -> None:
    """InputError if the head in the file differs from the embedding. Each rank reads some rows."""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    head, embedding = (folder.get_slice(name) for name in names)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for first in range(rank * _ROWS, vocab_size, ranks * _ROWS):
        rows = slice(first, first + _ROWS)
        if not torch.equal(head[rows], embedding[rows]):
            raise InputError(OWN_HEAD.format(folder=folder.path))


@torch.no_grad()
def load_hf_weights(
    chunks: Sequence[torch.nn.Module], spec: ModelSpec, path: str | Path, pg_collection: Any
) -> None:
    """Read a Hugging Face folder into this rank's model chunks, in place. Zero collectives.

    Each rank reads only the bytes of its own shards. Values are cast to the parameters' dtype;
    padding rows of the vocabulary become zero. An optimizer that copies the parameters must be
    built, or reloaded, afterwards.

    Args:
        chunks: this rank's ``GPTModel`` chunks, wrapped or not.
        spec: the model.
        path: folder with ``model.safetensors`` or a sharded checkpoint with its index.
        pg_collection: Megatron's ``ProcessGroupCollection``; uses ``tp``, ``expt_tp``, ``ep``.

    Raises:
        InputError: a missing, unknown or misshapen tensor, or a model that does not match.
            Nothing is loaded.
    """
    if isinstance(spec, ExternalSpec):
        return spec.load(chunks, str(path))
    ranks = ShardRanks.of(pg_collection)
    bound = [item for group in bind(chunks, spec.groups, ranks) for item in group]
    folder = open_checkpoint(spec, path)
    for mapping, parameter in bound:
        sources = [folder.get_slice(name) for name, _ in mapping.huggingface]
        shard = ranks.shard(mapping)
        shard_into(parameter, sources, mapping.layout, *shard, mapping.query_groups)


def save_hf(
    chunks: Sequence[torch.nn.Module],
    spec: ModelSpec,
    out_dir: str | Path,
    source_dir: str | Path,
    pg_collection: Any,
    dtype: torch.dtype,
    max_file_bytes: int = 4 << 30,
    tokenizer: str | None = None,
) -> None:
    """Write the model as a Hugging Face folder for ``from_pretrained``, one layer at a time.

    Rank 0 writes files of at most ``max_file_bytes`` (a single tensor may exceed it) and keeps one
    file in host memory. Configuration and tokenizer are copied from ``source_dir``; the tokenizer
    from ``tokenizer`` (a folder or a SentencePiece file) if it is given.

    Collectives: those of :class:`WeightGatherer`; then one gather over all ranks, so that a failed
    write raises on every rank.

    Raises:
        InputError: ``out_dir`` exists and is not an earlier export.
        OSError, SafetensorError: rank 0 could not write.
    """
    source: ExportedWeightSource | WeightGatherer
    if isinstance(spec, ExternalSpec):
        source = ExportedWeightSource(partial(spec.export, chunks, str(source_dir)), dtype)
    else:
        source = WeightGatherer(chunks, spec, pg_collection, dtype=dtype)
    metadata, stream = source.metadata(), iter(source)
    failure: Exception | None = None
    if dist.get_rank() == 0:
        paths = Path(out_dir), Path(source_dir)
        try:
            write_folder(metadata, stream, *paths, dtype, max_file_bytes, tokenizer)
        except (OSError, ValueError, SafetensorError) as error:
            failure = error
    for _ in stream:  # every rank takes part in all gathers, even if rank 0 failed to write
        pass
    if failure := first_not_none(failure):
        raise failure
