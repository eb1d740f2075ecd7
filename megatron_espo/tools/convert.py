"""Hugging Face folder to Megatron checkpoint, and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_espo.config import Config
from megatron_espo.config.checks import check_model
from megatron_espo.distributed import runtime as distributed_runtime
from megatron_espo.megatron.checkpoint import (
    check_existing,
    load_checkpoint,
    read_manifest,
    save_checkpoint,
)
from megatron_espo.megatron.model import build_configured
from megatron_espo.models.spec import ModelSpec
from megatron_espo.weights.hf_io import load_hf_weights, save_hf


def hf_to_megatron(config: Config, out: str | Path) -> None:
    """Write the weights of ``model.path`` as a Megatron checkpoint. Collective over all ranks.

    The checkpoint has the layout of ``config.megatron``.

    Raises:
        InputError: ``out`` exists.
    """
    spec = check_model(config)
    check_existing(out)
    with _model(config, spec) as (chunks, groups):
        load_hf_weights(chunks, spec, config.model.path, groups)
        save_checkpoint(chunks, spec, out).finish()


def megatron_to_hf(config: Config, checkpoint: str | Path, out: str | Path) -> None:
    """Write a checkpoint as a Hugging Face folder. Collective over all ranks.

    Configuration and tokenizer come from ``model.path``. The layout of ``config.megatron`` may
    differ from the layout that wrote the checkpoint.

    Raises:
        InputError: ``out`` exists, or ``checkpoint`` is missing, damaged, of another format or of
            another model.
    """
    spec, dtype = check_model(config), getattr(torch, config.model.dtype)
    check_existing(out)
    read_manifest(checkpoint, spec)
    with _model(config, spec) as (chunks, groups):
        load_checkpoint(chunks, spec, checkpoint)
        paths = (out, config.model.path)
        save_hf(chunks, spec, *paths, groups, dtype, tokenizer=config.model.tokenizer)


@contextmanager
def _model(config: Config, spec: ModelSpec) -> Iterator[tuple[list, Any]]:
    """The model's chunks and the process groups, in the layout of ``config.megatron``."""
    runtime = distributed_runtime.initialize(**distributed_runtime.parallel_sizes(config.megatron))
    yield build_configured(config, spec, runtime.groups), runtime.groups
    distributed_runtime.shutdown()
