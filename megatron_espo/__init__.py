"""ESPO post-training for Megatron-Core. Public names are loaded on first use."""

import importlib

__version__ = "0.2.0"

_PUBLIC = {
    "Config": "megatron_espo.config",
    "load_config": "megatron_espo.config",
    "InputError": "megatron_espo.errors",
    "MicroBatch": "megatron_espo.data.packing",
    "PackingSpec": "megatron_espo.data.packing",
    "TrainSequence": "megatron_espo.data.packing",
    "batch_totals": "megatron_espo.data.packing",
    "pack": "megatron_espo.data.packing",
    "group_advantages": "megatron_espo.algo",
    "make_forward_step": "megatron_espo.megatron.forward_step",
    "MegatronWeightSource": "megatron_espo.weights.vllm_source",
    "RewardFunction": "megatron_espo.rewards.functions",
    "vocab_parallel_logprob_entropy": "megatron_espo.numerics",
    "train": "megatron_espo.trainer.train",
}

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604 - names are resolved by __getattr__


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
