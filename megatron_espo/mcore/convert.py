"""Hugging Face folder to Megatron checkpoint, and back."""

from pathlib import Path

import torch

from megatron_espo.config import Config
from megatron_espo.mcore import runtime as mcore_runtime
from megatron_espo.mcore.checkpoint import load_checkpoint, read_manifest, refuse_existing, save_checkpoint
from megatron_espo.mcore.model import build_configured
from megatron_espo.weights.hf_io import load_hf_weights, save_hf


def hf_to_megatron(config: Config, out: str | Path) -> None:
    """Write the weights of ``model.path`` as a Megatron checkpoint, in the layout of ``config.megatron``. Collective over all ranks.

    Raises:
        InputError: ``out`` exists.
    """
    hf_config = config.validate_model()
    refuse_existing(out)
    runtime = mcore_runtime.initialize(**mcore_runtime.parallel_sizes(config.megatron))
    chunks = build_configured(config, hf_config, runtime.groups)
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
    chunks = build_configured(config, hf_config, runtime.groups)
    load_checkpoint(chunks, hf_config, checkpoint)
    save_hf(chunks, hf_config, out, config.model.path, runtime.groups, getattr(torch, config.model.dtype))
    mcore_runtime.shutdown()
