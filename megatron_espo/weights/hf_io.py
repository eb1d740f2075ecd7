"""Load a Hugging Face folder into a Megatron model, and export a model to such a folder."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
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


def open_checkpoint(spec: ModelSpec, path: str | Path) -> Callable[[str], Any]:
    """Open ``model.safetensors``, or the files in ``model.safetensors.index.json``.

    Reads headers only; of a tied model also the output layer, if the files have one.

    Returns:
        A function from the name of a tensor to safetensors' lazy slice, which reads only the bytes
        that are indexed.

    Raises:
        InputError: no weights, an unreadable file, or a missing, unknown or misshapen tensor.
    """
    folder = Path(path)
    for problem in chain(weight_problems(folder), tensor_problems(folder, spec)):
        raise InputError(problem)
    file_of, _ = stored_tensors(folder)
    files = {file: safe_open(file, framework="pt") for file in set(file_of.values())}

    def get_slice(name: str) -> Any:
        return files[file_of[name]].get_slice(name)

    if spec.tie_word_embeddings and "lm_head.weight" in file_of:
        head, embedding = get_slice("lm_head.weight"), get_slice("model.embed_tokens.weight")
        if not _are_equal(head, embedding, spec.vocab_size):
            raise InputError(OWN_HEAD.format(folder=folder))
    return get_slice


def _are_equal(head: Any, embedding: Any, vocab_size: int) -> bool:
    """Compare the rows of two slices. Each rank compares some of them."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    blocks = (slice(i, i + _ROWS) for i in range(rank * _ROWS, vocab_size, ranks * _ROWS))
    return all(torch.equal(head[rows], embedding[rows]) for rows in blocks)


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
    bound = bind(chunks, spec.groups, ranks)
    get_slice = open_checkpoint(spec, path)
    for mapping, parameter in bound.items():
        sources = [get_slice(name) for name, _ in mapping.huggingface]
        rank, size = ranks.shard(mapping)
        shard_into(parameter, sources, mapping.layout, rank, size, mapping.query_groups)


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
