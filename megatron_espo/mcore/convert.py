"""Hugging Face folder to Megatron checkpoint, and back."""

from pathlib import Path
from typing import Any

import torch

from megatron_espo.config import Config
from megatron_espo.mcore import runtime as mcore_runtime
from megatron_espo.mcore.checkpoint import load_checkpoint, read_manifest, refuse_existing, save_checkpoint
from megatron_espo.mcore.model import Layout, build_model
from megatron_espo.weights.hf_io import load_hf_weights, save_hf


def hf_to_megatron(config: Config, out: str | Path) -> None:
    """Write the weights of ``model.path`` as a Megatron checkpoint, in the layout of ``config.megatron``. Collective over all ranks.

    Raises:
        InputError: ``out`` exists.
    """
    hf_config = config.validate_model()
    refuse_existing(out)
    runtime = mcore_runtime.initialize(**mcore_runtime.parallel_sizes(config.megatron))
    chunks = _build_chunks(config, hf_config, runtime)
    load_hf_weights(chunks, hf_config, config.model.path, runtime.groups)
    save_checkpoint(chunks, hf_config, out)
    mcore_runtime.shutdown()


def megatron_to_hf(config: Config, checkpoint: str | Path, out: str | Path) -> None:
    """Write a checkpoint as a Hugging Face folder, with configuration and tokenizer of ``model.path``. Collective over all ranks.

    The layout of ``config.megatron`` need not be the one that wrote the checkpoint.

    Raises:
        InputError: ``out`` exists, or ``checkpoint`` is missing, foreign, damaged or another model's.
    """
    hf_config = config.validate_model()
    refuse_existing(out)
    read_manifest(checkpoint, hf_config)
    runtime = mcore_runtime.initialize(**mcore_runtime.parallel_sizes(config.megatron))
    chunks = _build_chunks(config, hf_config, runtime)
    load_checkpoint(chunks, hf_config, checkpoint)
    save_hf(chunks, hf_config, out, config.model.path, runtime.groups, getattr(torch, config.model.dtype))
    mcore_runtime.shutdown()


def _build_chunks(config: Config, hf_config: dict[str, Any], runtime: mcore_runtime.Runtime) -> list[torch.nn.Module]:
    """This rank's chunks in the configured layout, without weights: reading a checkpoint needs no other weights first."""
    layout = Layout(**{name: getattr(config.megatron, name) for name in Layout.__dataclass_fields__})
    dtype = getattr(torch, config.model.dtype)
    return build_model(hf_config, layout, runtime.groups, dtype=dtype, transformer_impl=config.megatron.transformer_impl)
