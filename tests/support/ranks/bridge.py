"""A model that another library builds. Runs on every rank."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from megatron_espo.config import load_config
from megatron_espo.config.checks import read_model
from megatron_espo.megatron.attention import SharedPrefixRotary
from megatron_espo.megatron.model import build_configured, layer_spec
from megatron_espo.models.bridge import MegatronBridge
from megatron_espo.weights.exporter import ExportedWeightSource
from megatron_espo.weights.hf_io import load_hf_weights, save_hf
from megatron_espo.weights.source import WeightGatherer
from tests.support.ranks.weights import start, whole_checkpoint
from tests.support.weights_models import load_spec

GROUPS: Any = None


@dataclass
class Provider(TransformerConfig):
    """The fields and methods of Megatron-Bridge's ``GPTModelProvider`` that the adapter uses."""

    spec: Any = None
    seq_length: int = 1024
    vocab_size: int | None = None
    should_pad_vocab: bool = False
    make_vocab_size_divisible_by: int = 128
    rotary_base: float = 10000.0
    activation_func: Any = torch.nn.functional.silu
    _pg_collection: Any = None
    finalized: bool = False

    def __post_init__(self) -> None:
        pass  # as the real one, which checks in finalize()

    def finalize(self) -> None:
        TransformerConfig.__post_init__(self)
        self.finalized = True

    def provide(self, pre_process=None, post_process=None, vp_stage=None) -> GPTModel:
        assert self.finalized and pre_process is None and post_process is None
        multiple = self.make_vocab_size_divisible_by * self.tensor_model_parallel_size
        rank, size = self._pg_collection.pp.rank(), self._pg_collection.pp.size()
        model = GPTModel(
            config=self,
            transformer_layer_spec=layer_spec(
                self.spec, self, False, vp_stage, self._pg_collection
            ),
            vocab_size=-(-self.vocab_size // multiple) * multiple,
            max_sequence_length=self.seq_length,
            pre_process=rank == 0,
            post_process=rank == size - 1,
            share_embeddings_and_output_weights=self.spec.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=self.rotary_base,
            pg_collection=self._pg_collection,
            vp_stage=vp_stage,
        )
        # Without Transformer Engine prompts are shared, as in the built-in families.
        model.rotary_pos_emb = SharedPrefixRotary(model.rotary_pos_emb)
        return model


class AutoBridge:
    """The signatures of Megatron-Bridge's class (commit 067f987, 2026-08-22)."""

    def __init__(self, path: str) -> None:
        self.path, self.spec = path, load_spec(path)

    @classmethod
    def from_hf_pretrained(cls, path: str | Path, **kwargs: Any) -> "AutoBridge":
        return cls(str(path))

    def to_megatron_provider(self, load_weights=True, hf_path=None) -> Provider:
        assert not load_weights
        arguments = self.spec.transformer_arguments()
        return Provider(**arguments, spec=self.spec, vocab_size=self.spec.vocab_size)

    def load_hf_weights(self, model, hf_path=None, allowed_mismatched_params=None):
        load_hf_weights(model, self.spec, hf_path or self.path, GROUPS)
        return model

    def export_hf_weights(
        self,
        model,
        cpu=False,
        show_progress=True,
        conversion_tasks=None,
        merge_adapter_weights=True,
        weight_dtype=None,
    ):
        # All ranks get all tensors.
        options = {"dtype": torch.float32, "all_replicas": True}
        yield from WeightGatherer(model, self.spec, GROUPS, **options)


class Bridged(MegatronBridge):
    """A family for ``model.family`` whose library is the stand-in."""

    def build(self, path: str, arguments: dict[str, Any], groups: Any) -> list[Any]:
        global GROUPS
        GROUPS = groups
        module = ModuleType("megatron.bridge")
        module.AutoBridge = AutoBridge  # type: ignore[attr-defined]
        sys.modules["megatron.bridge"] = module
        return super().build(path, arguments, groups)


def check_model(folder: str, out: str, sizes: dict[str, Any]) -> list[str]:
    """Build, load, stream and export a model through the adapter. Return the streamed names."""
    groups = start(sizes)
    config = load_config(
        Path(folder).parent / "run.yaml", [f"megatron.{k}={v}" for k, v in sizes.items()]
    )
    spec = read_model(config)
    chunks = build_configured(config, spec, groups)
    settings = chunks[0].config
    assert settings.calculate_per_token_loss and settings.hidden_dropout == 0
    assert settings.params_dtype == torch.float32
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))
    load_hf_weights(chunks, spec, folder, groups)
    source = ExportedWeightSource(partial(spec.export, chunks, folder), torch.float32)
    expected = whole_checkpoint(folder)
    streamed = {name: tensor.clone() for name, tensor in source}
    assert streamed.keys() == expected.keys()
    assert all(torch.equal(streamed[name], expected[name]) for name in expected)
    save_hf(chunks, spec, out, folder, groups, torch.float32)
    return sorted(streamed)
