"""A model that Megatron-Bridge builds, loads and exports, behind a stand-in with its signatures.

The library itself needs Transformer Engine, so it needs a GPU.
"""

import inspect
import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_espo.config import load_config
from megatron_espo.errors import InputError
from megatron_espo.models.bridge import MegatronBridge
from megatron_espo.models.registry import read_spec
from megatron_espo.tools.plan.memory import plan_engine
from tests.support.distributed import run_ranks
from tests.support.ranks import bridge as stand_in
from tests.support.tiny import save_tiny_model, write_tiny_run
from tests.support.weights_models import save_model
from tests.test_end_to_end import load_weights, run_training

FAMILY = "megatron_espo.models.bridge:MegatronBridge"
STAND_IN = "tests.support.ranks.bridge:Bridged"


@pytest.mark.parametrize(
    "sizes", [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}]
)
def test_a_bridged_model_is_loaded_streamed_and_exported(tmp_path, sizes):
    folder, out = tmp_path / "model", tmp_path / "out"
    expected = save_model("qwen3", folder).state_dict()
    write_tiny_run(tmp_path, model={"path": str(folder), "family": STAND_IN})
    arguments = {"folder": str(folder), "out": str(out), "sizes": sizes}
    names = run_ranks(2, "tests.support.ranks.bridge:check_model", **arguments)
    exported = {k: t for file in out.glob("*.safetensors") for k, t in load_file(file).items()}
    assert sorted(exported) == names == sorted(expected)
    assert all(torch.equal(exported[name], expected[name]) for name in expected)


def test_sizes_come_from_any_configuration():
    """Names of DeepSeek-V3, and a language model inside another configuration."""
    sizes = {
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "vocab_size": 131,
        "max_position_embeddings": 64,
    }
    experts = {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    }
    hf = {"architectures": ["Any"], "text_config": sizes | experts}
    spec = read_spec(hf, FAMILY)
    assert isinstance(spec, MegatronBridge) and spec.vocab_size == 131
    assert (spec.experts.count, spec.experts.ffn, spec.experts.indices) == (8, 16, [1, 2])
    assert read_spec(sizes, FAMILY).experts is None
    with pytest.raises(InputError, match="vocab_size"):
        read_spec({k: v for k, v in sizes.items() if k != "vocab_size"}, FAMILY)
    with pytest.raises(InputError, match="model.family"):
        _ = spec.tensor_shapes


def test_a_run_is_valid_without_the_library_which_is_named_at_the_build(tmp_path):
    save_model("qwen3", tmp_path / "model")
    write_tiny_run(tmp_path, model={"path": str(tmp_path / "model"), "family": FAMILY})
    config = load_config(tmp_path / "run.yaml", [])
    spec = read_spec(json.loads((tmp_path / "model/config.json").read_text()), config.model.family)
    with pytest.raises(InputError, match="megatron-bridge"):
        spec.load([], config.model.path)
    with pytest.raises(InputError, match="model.family"):
        plan_engine(config, spec, True, 10**9)


def test_the_stand_in_has_the_signatures_of_the_library():
    real = pytest.importorskip("megatron.bridge", reason="megatron-bridge is not installed")
    for name in ("to_megatron_provider", "load_hf_weights", "export_hf_weights"):
        theirs = inspect.signature(getattr(real.AutoBridge, name)).parameters
        ours = inspect.signature(getattr(stand_in.AutoBridge, name)).parameters
        assert list(ours) == list(theirs)


@pytest.mark.slow
def test_a_run_with_a_bridged_model_equals_the_run_of_the_built_in_family(tmp_path):
    save_tiny_model(tmp_path / "model")
    write_tiny_run(tmp_path)
    weights = []
    for name, family in (("own", []), ("bridged", [f"model.family={STAND_IN}"])):
        done = run_training(tmp_path, "run.steps=2", f"run.dir={tmp_path / name}", *family)
        assert done.returncode == 0, done.stdout + done.stderr
        weights.append(load_weights(tmp_path / name / "hf"))
    own, bridged = weights
    assert own.keys() == bridged.keys()
    assert all(torch.equal(own[name], bridged[name]) for name in own)
