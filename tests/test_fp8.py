"""8-bit matrix products: settings, model and micro-batches; the numbers on a GPU only."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_espo.config import Config, Data, Megatron, Model, load_config
from megatron_espo.config.checks import check_model
from megatron_espo.data.packing import batch_totals, pack
from megatron_espo.distributed.cpu import install
from megatron_espo.errors import InputError
from megatron_espo.models.registry import read_spec

install()
from megatron_espo.megatron.actor import packing_spec
from megatron_espo.megatron.model import build_configured, transformer_config
from tests.support.bad_inputs import LLAMA, MOE
from tests.support.distributed import ROOT
from tests.support.weights_models import save_model
from tests.test_packing import make_sequences

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["megatron.transformer_impl=local"], "fp8: expected null with transformer_impl local"),
        (["model.dtype=float32"], "megatron.fp8: expected null with model.dtype float32"),
        (["megatron.fp8=e5m2"], "megatron.fp8: expected one of hybrid, e4m3 or null, got"),
    ],
)
def test_unsupported_combinations_are_refused(tmp_path, overrides, message):
    (tmp_path / "run.yaml").write_text(
        "model: {path: model}\ndata: {prompts: p.jsonl}\nmegatron: {fp8: hybrid}\n"
    )
    with pytest.raises(InputError, match=message):
        load_config(str(tmp_path / "run.yaml"), overrides)


LONG = {"max_position_embeddings": 9999}


def config(**megatron) -> Config:
    return Config(
        model=Model(path="none"),
        data=Data(prompts="p.jsonl"),
        megatron=Megatron(fp8="hybrid", **megatron),
    )


def test_sizes_must_be_multiples_of_16():
    with pytest.raises(InputError, match="megatron.fp8: expected null with 8 hidden columns"):
        check_model(config(), read_spec(LLAMA | {"intermediate_size": 16} | LONG))
    with pytest.raises(
        InputError, match="megatron.fp8: expected null with 24 feed-forward columns per rank"
    ):
        check_model(
            config(tensor_model_parallel_size=2),
            read_spec(LLAMA | WIDE | {"intermediate_size": 48} | LONG),
        )


def test_transformer_config_has_fp8(monkeypatch):
    megatron = Megatron(fp8="hybrid", fp8_recipe="blockwise", transformer_impl="transformer_engine")
    found = transformer_config(read_spec(LLAMA | WIDE), megatron, torch.bfloat16)
    assert (found.fp8, found.fp8_recipe) == ("hybrid", "blockwise")
    key = "moe_router_padding_for_quantization"
    # Transformer Engine is not here.
    has_te = "megatron.core.transformer.transformer_config.is_te_min_version"
    monkeypatch.setattr(has_te, lambda *version: True)
    for fp8 in ("hybrid", None):
        found = transformer_config(read_spec(MOE), Megatron(fp8=fp8), torch.bfloat16)
        assert getattr(found, key) == bool(fp8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp8_is_refused_without_transformer_engine():
    with pytest.raises(
        InputError,
        match="megatron.fp8: expected null on a machine without GPUs .*, got hybrid",
    ):
        build_configured(config(), read_spec(LLAMA | WIDE), None)


@pytest.mark.parametrize(("recipe", "multiple"), [("tensorwise", 16), ("mxfp8", 32)])
@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (2, 1), (2, 2)])
def test_tokens_of_each_rank_are_a_multiple(recipe, multiple, tp, cp):
    """Sequence parallelism splits the tokens over tensor-parallel ranks."""
    place = SimpleNamespace(
        **{
            name: SimpleNamespace(rank=lambda: 0, size=lambda n=n: n)
            for name, n in (("dp", 1), ("cp", cp), ("tp", tp), ("pp", 1))
        }
    )
    settings = Megatron(
        fp8="hybrid",
        fp8_recipe=recipe,
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        sequence_parallel=tp > 1,
        max_tokens_per_micro_batch=40,
    )
    sequences = make_sequences([(3, 5), (7, 2), (4, 21)])
    batches = pack(
        sequences,
        batch_totals(sequences, num_responses=3, num_response_tokens=28),
        packing_spec(settings, place),
    )
    assert batches and all(batch.tokens.numel() % (multiple * tp) == 0 for batch in batches)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_log_probs_are_near_those_of_bfloat16(tmp_path):
    """Compares a random model's log-probs in bfloat16 and with 8-bit matrix products."""
    pytest.importorskip("transformer_engine")
    save_model("llama", tmp_path)
    # A forked rank of `run_ranks` cannot use a GPU that its parent has used.
    code = f"from tests.support.ranks.fp8 import gap; print('gap', gap({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 0 < float(re.search(r"^gap (.+)$", done.stdout, re.M)[1]) < 0.2
