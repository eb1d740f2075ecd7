"""8-bit matrix products through Transformer Engine: what they need of settings, model and micro-batches; numbers on a GPU only."""

from types import SimpleNamespace

import pytest
import torch

from megatron_espo.config import Config, Data, Megatron, Model, load_config
from megatron_espo.data.packing import batch_totals, pack
from megatron_espo.errors import InputError
from megatron_espo.mcore.cpu import install

install()
from megatron_espo.mcore.learner import packing_options
from megatron_espo.mcore.model import Layout, build_configured, moe_arguments, transformer_config
from tests.bad_inputs import LLAMA, MOE
from tests.distributed import run_ranks
from tests.test_packing import make_sequences
from tests.weights_models import save_model

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["megatron.transformer_impl=local"], "fp8: expected null with transformer_impl local"),
        (["model.dtype=float32"], "megatron.fp8: expected null with model.dtype float32"),
        (["megatron.fp8=e5m2"], "megatron.fp8: expected one of hybrid, e4m3 or null, got"),
    ],
)
def test_what_does_not_go_together(tmp_path, overrides, message):
    (tmp_path / "run.yaml").write_text("model: {path: model}\ndata: {prompts: p.jsonl}\nmegatron: {fp8: hybrid}\n")
    with pytest.raises(InputError, match=message):
        load_config(str(tmp_path / "run.yaml"), overrides)


def config(**megatron) -> Config:
    return Config(model=Model(path="none"), data=Data(prompts="p.jsonl"), megatron=Megatron(fp8="hybrid", **megatron))


def test_sizes_must_be_multiples_of_16():
    with pytest.raises(InputError, match="megatron.fp8: expected null with 8 hidden columns"):
        config().validate_model(LLAMA | {"intermediate_size": 16, "max_position_embeddings": 9999})
    with pytest.raises(InputError, match="megatron.fp8: expected null with 24 feed-forward columns a rank"):
        config(tensor_model_parallel_size=2).validate_model(LLAMA | WIDE | {"intermediate_size": 48, "max_position_embeddings": 9999})


def test_megatron_is_told():
    layout = Layout(fp8="hybrid", fp8_recipe="blockwise")
    found = transformer_config(LLAMA | WIDE, layout, torch.bfloat16, "transformer_engine")
    assert (found.fp8, found.fp8_recipe) == ("hybrid", "blockwise")
    assert transformer_config(MOE | WIDE, layout, torch.bfloat16, "local").fp8 is None, "for a plan"
    assert moe_arguments(MOE, "hybrid")["moe_router_padding_for_quantization"] and not moe_arguments(MOE)["moe_router_padding_for_quantization"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_transformer_engine_it_is_refused():
    with pytest.raises(InputError, match="megatron.fp8: expected null on a machine without GPUs or without Transformer Engine, got hybrid"):
        build_configured(config(), LLAMA | WIDE, None)


@pytest.mark.parametrize(("recipe", "multiple"), [("tensorwise", 16), ("mxfp8", 32)])
@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (2, 1), (2, 2)])
def test_each_ranks_tokens_are_a_multiple(recipe, multiple, tp, cp):
    """Under sequence parallelism the layers' matrix products see a tensor-parallel rank's share."""
    place = SimpleNamespace(**{name: SimpleNamespace(rank=lambda: 0, size=lambda n=n: n) for name, n in (("dp", 1), ("cp", cp), ("tp", tp), ("pp", 1))})
    settings = Megatron(fp8="hybrid", fp8_recipe=recipe, tensor_model_parallel_size=tp, context_parallel_size=cp, sequence_parallel=tp > 1, max_tokens_per_micro_batch=40)
    sequences = make_sequences([(3, 5), (7, 2), (4, 21)])
    batches = pack(sequences, batch_totals(sequences, num_responses=3, num_response_tokens=28), **packing_options(settings, place))
    assert batches and all(batch.tokens.numel() % (multiple * tp) == 0 for batch in batches)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_log_probs_are_near_those_of_bfloat16(tmp_path):
    """A random model's log-probs in bfloat16, and with the layers' products in 8 bits."""
    pytest.importorskip("transformer_engine")
    save_model("llama", tmp_path)
    gap = run_ranks(1, "tests.ranks.fp8:gap", folder=str(tmp_path))
    assert 0 < gap < 0.2
