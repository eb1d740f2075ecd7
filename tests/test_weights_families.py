"""Mapping tables against transformers' models and Megatron's parameter names."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    YarnRotaryEmbedding,
    _yarn_get_concentration_factor_from_config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_espo.config import Megatron
from megatron_espo.errors import InputError
from megatron_espo.megatron.model import layer_spec, transformer_config
from megatron_espo.models import mapping as rules
from megatron_espo.models.glm import Glm
from megatron_espo.models.layouts import local_shape, shard_into, unshard_into
from megatron_espo.models.llama import Llama
from megatron_espo.models.registry import read_spec
from megatron_espo.models.spec import ModelSpec, is_unused
from megatron_espo.weights.binding import ShardIndex, ShardRanks, bind
from tests.support.weights_models import FAMILIES, checkpoint_of, make_model

# Parameter names of a decoder layer under Megatron-Core's layer specs (gpt_layer_specs.py). They
# are recorded because Transformer Engine, which fuses norms into linear layers, needs a GPU.
TRANSFORMER_ENGINE_LAYER = {
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
}
LOCAL_LAYER = {
    "input_layernorm.weight",
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.weight",
    "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
}
SPARSE_LAYERS = {"qwen3_moe": (0, 1, 2, 3), "qwen3_moe_mixed": (1,)}
SPARSE_LAYERS |= dict.fromkeys(("glm4_moe", "deepseek_v2", "deepseek_v3"), (1, 2, 3))
SHARED_EXPERTS = {"mlp.shared_experts.linear_fc1.weight", "mlp.shared_experts.linear_fc2.weight"}
# A layer with two experts: one module with Transformer Engine (TEGroupedMLP), else SequentialMLP.
DENSE_MLP = {"mlp.linear_fc1.weight", "mlp.linear_fc2.weight", "mlp.linear_fc1.layer_norm_weight"}
ROUTED = {"pre_mlp_layernorm.weight", "mlp.router.weight"}
TRANSFORMER_ENGINE_EXPERTS = (
    (TRANSFORMER_ENGINE_LAYER - DENSE_MLP)
    | ROUTED
    | {
        "mlp.experts.linear_fc1.weight0",
        "mlp.experts.linear_fc1.weight1",
        "mlp.experts.linear_fc2.weight0",
        "mlp.experts.linear_fc2.weight1",
    }
)
LOCAL_EXPERTS = (
    (LOCAL_LAYER - DENSE_MLP)
    | ROUTED
    | {
        "mlp.experts.local_experts.0.linear_fc1.weight",
        "mlp.experts.local_experts.0.linear_fc2.weight",
        "mlp.experts.local_experts.1.linear_fc1.weight",
        "mlp.experts.local_experts.1.linear_fc2.weight",
    }
)
EXTRA = {
    "qwen2": {"self_attention.linear_qkv.bias"},
    "qwen3": {"self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"},
}
EXTRA["glm"] = EXTRA["qwen2"]
EXTRA["glm4"] = EXTRA["qwen2"] | {
    "self_attention.linear_proj.post_layernorm.weight",
    "mlp.linear_fc2.post_layernorm.weight",
}
EXTRA["glm4_moe"] = EXTRA["qwen2"] | EXTRA["qwen3"]
LATENT = {
    "input_layernorm.weight",
    "self_attention.linear_kv_down_proj.weight",
    "self_attention.kv_layernorm.weight",
    "self_attention.linear_kv_up_proj.weight",
}
EXTRA["deepseek_v2"] = {"self_attention.linear_q_proj.weight"}
EXTRA["deepseek_v3"] = {
    "self_attention.linear_q_down_proj.weight",
    "self_attention.q_layernorm.weight",
    "self_attention.linear_q_up_proj.weight",
}
EXTRA |= dict.fromkeys(("qwen3_yarn", "qwen3_moe", "qwen3_moe_mixed"), EXTRA["qwen3"])


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_transformers(family):
    model = make_model(family)
    named = {name: tuple(tensor.shape) for name, tensor in checkpoint_of(model).items()}
    mapped = [
        item
        for group in read_spec(model.config.to_dict()).groups
        for m in group
        for item in m.huggingface
    ]
    assert dict(mapped) == named
    assert len(mapped) == len(named)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_exact(family, tp_size):
    model = make_model(family)
    state = checkpoint_of(model)
    with torch.no_grad():
        for mapping in (m for group in read_spec(model.config.to_dict()).groups for m in group):
            sources = [state[name] for name, _ in mapping.huggingface]
            shape = local_shape(mapping.layout, [s.shape for s in sources], tp_size, 160)
            shards = [torch.full(shape, float("nan")) for _ in range(tp_size)]
            for rank, shard in enumerate(shards):
                shard_into(shard, sources, mapping.layout, rank, tp_size, mapping.query_groups)
            outputs = [torch.full_like(source, float("nan")) for source in sources]
            for rank, shard in enumerate(shards):
                unshard_into(outputs, shard, mapping.layout, rank, tp_size, mapping.query_groups)
            assert all(map(torch.equal, outputs, sources)), mapping


NAMES = [(TRANSFORMER_ENGINE_LAYER, TRANSFORMER_ENGINE_EXPERTS), (LOCAL_LAYER, LOCAL_EXPERTS)]


@pytest.mark.parametrize("dense, experts", NAMES, ids=["transformer_engine", "local"])
@pytest.mark.parametrize("family", FAMILIES)
def test_megatron_layer_names(family, dense, experts):
    spec = read_spec(make_model(family).config.to_dict())
    with_experts = SPARSE_LAYERS.get(family, ())
    if spec.experts and spec.experts.shared_ffn:
        experts = experts | SHARED_EXPERTS
    if spec.experts and spec.experts.is_biased:
        experts = experts | {"mlp.router.expert_bias"}
    if spec.is_latent:
        dense, experts = (
            {name for name in names if "linear_qkv" not in name} | LATENT
            for names in (dense, experts)
        )
    ranks = ShardRanks(ep=ShardIndex(1, 2))  # second of two ranks; each has two of the four experts
    for index, group in enumerate(spec.groups[1:-1]):
        expected = (experts if index in with_experts else dense) | EXTRA.get(family, set())
        alternatives = [set(ranks.local_names(m)) for m in group if ranks.holds(m)]
        assert all(m.expert in (None, 2, 3) for m in group if ranks.holds(m))
        prefix = f"decoder.layers.{index}."
        assert all(len(names & {prefix + e for e in expected}) == 1 for names in alternatives)
        assert {prefix + e for e in expected} <= set().union(*alternatives)


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("glm4_moe", {"tie_word_embeddings": True}, "tie_word_embeddings: expected false"),
        ("glm4_moe", {"norm_topk_prob": False}, "norm_topk_prob: expected true"),
        ("glm4_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok above 1"),
        ("glm4_moe", {"n_group": 2, "topk_group": 2}, r"topk_group: expected half of .* \(2\)"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "topk_method: expected 'greedy'"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func: expected 'sigmoid'"),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps: expected 1e-06"),
    ],
    ids=str,
)
def test_models_that_megatron_computes_otherwise_are_refused(family, changes, message):
    config = make_model(family).config.to_dict()
    with pytest.raises(InputError, match=message):
        read_spec(config | changes)


def test_layers_that_predict_further_tokens_are_ignored():
    config = make_model("glm4_moe").config.to_dict()
    assert config["num_nextn_predict_layers"] == 1
    assert is_unused(config, "model.layers.4.eh_proj.weight")
    assert not is_unused(config, "model.layers.3.eh_proj.weight")
    assert not is_unused(config, "model.layers.5.eh_proj.weight")


def test_tied_embeddings_have_no_head():
    config = make_model("llama_tied").config.to_dict()
    groups = read_spec(config).groups
    assert [m.megatron for m in groups[-1]] == [("decoder.final_layernorm.weight",)]
    assert groups[0][0].megatron == ("embedding.word_embeddings.weight", "output_layer.weight")
    untied = read_spec(config | {"tie_word_embeddings": False}).groups
    assert untied[-1][1].huggingface[0][0] == "lm_head.weight"


def test_unknown_family_is_named():
    with pytest.raises(InputError, match="expected one of LlamaForCausalLM, .*got GptOss"):
        read_spec({"architectures": ["GptOss"]})


class Mine(Llama):
    """A family outside the package."""

    architecture, model_type = "MyForCausalLM", "mine"

    def change_layer(self, layer):
        layer.metainfo["mine"] = True


def test_a_family_outside_the_package():
    config = make_model("llama").config.to_dict()
    config |= {"architectures": ["MyForCausalLM"], "model_type": "mine"}
    with pytest.raises(InputError, match="got MyForCausalLM; model.family adds your own"):
        read_spec(config)
    spec = read_spec(config, f"{__name__}:Mine")
    assert spec.groups == replace(spec).groups and spec.architecture == "MyForCausalLM"
    with pytest.raises(InputError, match="model_type: expected mine"):
        read_spec(config | {"model_type": "llama"}, f"{__name__}:Mine")
    groups = SimpleNamespace(pp=SimpleNamespace(rank=lambda: 0))
    arguments = transformer_config(spec, Megatron(), torch.float32)
    block = layer_spec(spec, arguments, False, None, groups)
    assert all(layer.metainfo["mine"] for layer in block.layer_specs)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mscale": 0.7, "mscale_all_dim": 1.3},
        {"attention_factor": 1.25, "beta_fast": 20, "truncate": False},
    ],
    ids=str,
)
def test_yarn_is_that_of_transformers(monkeypatch, changes):
    config = make_model("qwen3_yarn").config
    config.rope_parameters = config.rope_parameters | changes
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    spec = read_spec(config.to_dict())
    assert spec.max_position_embeddings == 64
    found = transformer_config(spec, Megatron(), torch.float32)
    assert _yarn_get_concentration_factor_from_config(found) == pytest.approx(factor, abs=1e-12)
    names = {
        "yarn_rotary_scaling_factor": "scaling_factor",
        "yarn_correction_range_round_to_int": "correction_range_round_to_int",
    }
    arguments = {names.get(n, n.removeprefix("yarn_")): v for n, v in spec.rope.yarn.items()}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    rotary = YarnRotaryEmbedding(
        spec.head_dim, rotary_base=spec.rope.theta, use_cpu_initialization=True, **arguments
    )
    table, _ = rotary.get_emb(2)
    assert torch.allclose(table[1, 0, 0, :8], frequencies, rtol=1e-6)


class Layers(torch.nn.Module):
    """A model chunk: nested modules with parameters of the given names and shapes."""

    def __init__(
        self,
        parameters: dict[str, tuple[int, ...]],
        layer_numbers: list[int],
        first=False,
        last=False,
    ):
        super().__init__()
        self.pre_process, self.post_process = first, last
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList(torch.nn.Module() for _ in layer_numbers)
        for layer, number in zip(self.decoder.layers, layer_numbers, strict=True):
            layer.layer_number = number
        for name, shape in parameters.items():
            *path, leaf = name.split(".")
            module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_parameter(leaf, torch.nn.Parameter(torch.zeros(shape)))


def layer_shapes(
    spec: ModelSpec, names: set[str], global_layer: int, local_layer: int, tp_size: int = 1
) -> dict:
    """``{name in the chunk: shape of this rank's shard}`` of one layer."""
    shapes = {}
    for mapping in spec.groups[1 + global_layer]:
        (name,) = {
            n.removeprefix(f"decoder.layers.{global_layer}.") for n in mapping.megatron
        } & names
        shape = local_shape(mapping.layout, [s for _, s in mapping.huggingface], tp_size)
        shapes[f"decoder.layers.{local_layer}.{name}"] = shape
    return shapes


def test_middle_stage_with_transformer_engine_names_binds_by_global_layer():
    spec = read_spec(make_model("qwen2").config.to_dict())
    names = TRANSFORMER_ENGINE_LAYER | EXTRA["qwen2"]
    chunk = Layers(layer_shapes(spec, names, 2, 0, tp_size=2), [3])
    bound = bind([chunk], spec.groups, ShardRanks(tp=ShardIndex(0, 2)))
    assert len(bound) == 7 and bound.keys() <= set(spec.groups[3])
    held = dict(chunk.named_parameters())
    for mapping, parameter in bound.items():
        names = [name.replace("layers.2.", "layers.0.") for name in mapping.megatron]
        assert any(held.get(name) is parameter for name in names)


def test_gate_and_up_projection_cut_as_one_matrix_are_refused():
    class Wrong(Glm):
        dense_mlp = (replace(rules.FUSED_GATE_UP, layout=rules.ShardLayout.COLUMN), rules.DOWN)

    spec = Wrong.read(make_model("glm").config.to_dict())
    with pytest.raises(InputError, match="linear_fc1.weight: expected layout gated or fused_gated"):
        _ = spec.groups


def test_mismatched_models_are_named():
    spec = read_spec(make_model("llama").config.to_dict())
    shapes = layer_shapes(spec, LOCAL_LAYER, 0, 0)

    def refuse(message: str, parameters: dict) -> None:
        with pytest.raises(InputError, match=message):
            bind([Layers(parameters, [1])], spec.groups, ShardRanks())

    linear_qkv, linear_fc2 = (
        "decoder.layers.0.self_attention.linear_qkv",
        "decoder.layers.0.mlp.linear_fc2",
    )
    refuse(f"'{linear_qkv}.bias' has no", shapes | {f"{linear_qkv}.bias": (64,)})
    refuse(
        "two parameters for 'model.layers.0.input_l",
        shapes | {f"{linear_qkv}.layer_norm_weight": (32,)},
    )
    without = {name: shape for name, shape in shapes.items() if "fc2" not in name}
    refuse(f"lacks {linear_fc2}.weight", without)
    refuse(
        rf"{linear_fc2}.weight': config.json implies shape \(32, 48\)",
        shapes | {f"{linear_fc2}.weight": (48, 32)},
    )
    with pytest.raises(InputError, match="lacks embedding.word_embeddings.weight"):
        bind([Layers(shapes, [1], first=True, last=False)], spec.groups, ShardRanks())
