"""Hugging Face folders into and out of a Megatron model."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from megatron_espo.weights.binding import Place, bind
from megatron_espo.weights.families import is_tied, model_groups
from megatron_espo.weights.hf_reader import CheckpointFolder
from megatron_espo.weights.hf_writer import write_folder
from megatron_espo.weights.layouts import shard_into
from megatron_espo.weights.source import MegatronWeightSource


def open_checkpoint(hf_config: dict[str, Any], path: str | Path) -> CheckpointFolder:
    """Open a Hugging Face folder and check that it has every tensor of the model and no other; reads headers only.

    Raises:
        InputError: unreadable files, or a tensor too few or too many.
    """
    folder = CheckpointFolder(path)
    expected = (name for group in model_groups(hf_config) for mapping in group for name, _ in mapping.huggingface)
    folder.check_names(expected, _ignored(hf_config))
    return folder


@torch.no_grad()
def load_hf_weights(
    chunks: Sequence[torch.nn.Module], hf_config: dict[str, Any], path: str | Path, pg_collection: Any
) -> None:
    """Read a Hugging Face folder into this rank's model chunks, in place. Zero collectives.

    Each rank reads the bytes of its own shards only. Values are cast to the parameters' dtype; padding rows of the
    vocabulary become zero. An optimizer with its own copy of the parameters has to be built, or reloaded, afterwards.

    Args:
        chunks: this rank's ``GPTModel`` chunks, wrapped or not.
        hf_config: content of ``config.json``.
        path: folder with ``model.safetensors`` or a sharded checkpoint with its index.
        pg_collection: Megatron's ``ProcessGroupCollection``; ``tp``, ``expt_tp`` and ``ep`` are used.

    Raises:
        InputError: a tensor too few, too many or of another shape, or a model that does not match; nothing is loaded.
    """
    groups = model_groups(hf_config)
    place = Place.of(pg_collection)
    bound_groups = bind(chunks, groups, place)
    folder = open_checkpoint(hf_config, path)
    bound = [item for group in bound_groups for item in group]
    sources = [[folder.get_slice(name, shape) for name, shape in mapping.huggingface] for mapping, _ in bound]
    for (mapping, parameter), slices in zip(bound, sources, strict=True):
        shard_into(parameter, slices, mapping.layout, *place.cut(mapping), mapping.query_groups)


def save_hf(
    chunks: Sequence[torch.nn.Module],
    hf_config: dict[str, Any],
    out_dir: str | Path,
    source_dir: str | Path,
    pg_collection: Any,
    dtype: torch.dtype,
    max_file_bytes: int = 4 << 30,
) -> None:
    """Write the model as a Hugging Face folder that ``from_pretrained`` loads, one decoder layer at a time.

    Rank 0 writes files of at most ``max_file_bytes`` (one tensor may exceed it), with one of them in host memory, into
    ``<out_dir>.partial``; the finished folder replaces ``out_dir`` by a rename. Configuration and tokenizer come from
    ``source_dir``, with the dtype set to the one written.

    Collectives: those of ``MegatronWeightSource``; then one broadcast over all ranks, so that a failed write raises on each.

    Raises:
        InputError: ``out_dir`` exists and is not an earlier export.
        RuntimeError: rank 0 could not write.
    """
    source = MegatronWeightSource(chunks, hf_config, pg_collection, dtype=dtype)
    failure = None
    stream = iter(source)
    if dist.get_rank() == 0:
        try:
            write_folder(source.metadata(), stream, Path(out_dir), Path(source_dir), dtype, max_file_bytes)
        except (OSError, ValueError, SafetensorError) as error:
            failure = error
    for _ in stream:  # the collectives need every rank, also one that does not write or no longer can
        pass
    outcome = [None if failure is None else f"{type(failure).__name__}: {failure}"]
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[0] is not None:
        raise RuntimeError(f"rank 0 could not write {out_dir}: {outcome[0]}")


def _ignored(hf_config: dict[str, Any]) -> Iterator[str]:
    """Tensors that transformers ignores too: a tied model's redundant head, and inverse frequencies in old exports."""
    if is_tied(hf_config):
        yield "lm_head.weight"
    for layer in range(hf_config["num_hidden_layers"]):
        yield f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
