"""Mapping tables against transformers' models and Megatron's parameter names."""

import pytest
import torch

from megatron_espo.errors import InputError
from megatron_espo.models.families import model_groups
from megatron_espo.models.layouts import ShardLayout, local_shape, shard_into, unshard_into
from megatron_espo.weights.binding import ShardIndex, ShardRanks, bind
from tests.support.weights_models import FAMILIES, make_model, per_expert

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
EXTRA |= {"qwen3_moe": EXTRA["qwen3"], "qwen3_moe_mixed": EXTRA["qwen3"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_transformers(family):
    model = make_model(family)
    named = {
        name: tuple(tensor.shape)
        for name, tensor in per_expert(dict(model.named_parameters())).items()
    }
    mapped = [
        item
        for group in model_groups(model.config.to_dict())
        for m in group
        for item in m.huggingface
    ]
    assert dict(mapped) == named
    assert len(mapped) == len(named)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_exact(family, tp_size):
    model = make_model(family)
    state = per_expert(dict(model.named_parameters()))
    with torch.no_grad():
        for mapping in (m for group in model_groups(model.config.to_dict()) for m in group):
            sources = [state[name] for name, _ in mapping.huggingface]
            padded = 160 if mapping.layout is ShardLayout.VOCAB else None
            shape = local_shape(mapping.layout, [s.shape for s in sources], tp_size, padded)
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
    with_experts = {"qwen3_moe": (0, 1, 2, 3), "qwen3_moe_mixed": (1,)}.get(family, ())
    config = make_model(family).config.to_dict()
    ranks = ShardRanks(ep=ShardIndex(1, 2))  # second of two ranks; each has two of the four experts
    for index, group in enumerate(model_groups(config)[1:-1]):
        expected = (experts if index in with_experts else dense) | EXTRA.get(family, set())
        alternatives = [set(ranks.local_names(m)) for m in group if ranks.holds(m)]
        assert all(m.expert in (None, 2, 3) for m in group if ranks.holds(m))
        prefix = f"decoder.layers.{index}."
        assert all(len(names & {prefix + e for e in expected}) == 1 for names in alternatives)
        assert {prefix + e for e in expected} <= set().union(*alternatives)


def test_tied_embeddings_have_no_head():
    config = make_model("llama_tied").config.to_dict()
    groups = model_groups(config)
    assert [m.megatron for m in groups[-1]] == [("decoder.final_layernorm.weight",)]
    assert groups[0][0].megatron == ("embedding.word_embeddings.weight", "output_layer.weight")
    untied = model_groups(config | {"tie_word_embeddings": False})
    assert untied[-1][1].huggingface[0][0] == "lm_head.weight"


def test_unknown_family_is_named():
    with pytest.raises(
        InputError, match="model_type is 'gpt_oss'.*llama, mistral, qwen2, qwen3, qwen3_moe"
    ):
        model_groups({"model_type": "gpt_oss"})


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
    config: dict, names: set[str], global_layer: int, local_layer: int, tp_size: int = 1
) -> dict:
    """``{name in the chunk: shape of this rank's shard}`` of one layer."""
    shapes = {}
    for mapping in model_groups(config)[1 + global_layer]:
        (name,) = {
            n.removeprefix(f"decoder.layers.{global_layer}.") for n in mapping.megatron
        } & names
        shape = local_shape(mapping.layout, [s for _, s in mapping.huggingface], tp_size)
        shapes[f"decoder.layers.{local_layer}.{name}"] = shape
    return shapes


def test_middle_stage_with_transformer_engine_names_binds_by_global_layer():
    config = make_model("qwen2").config.to_dict()
    names = TRANSFORMER_ENGINE_LAYER | EXTRA["qwen2"]
    chunk = Layers(layer_shapes(config, names, 2, 0, tp_size=2), [3])
    bound = bind([chunk], model_groups(config), ShardRanks(tp=ShardIndex(0, 2)))
    assert [len(group) for group in bound] == [0, 0, 0, 7, 0, 0]
    held = dict(chunk.named_parameters())
    for mapping, parameter in bound[3]:
        names = [name.replace("layers.2.", "layers.0.") for name in mapping.megatron]
        assert any(held.get(name) is parameter for name in names)


def test_mismatched_models_are_named():
    config = make_model("llama").config.to_dict()
    shapes = layer_shapes(config, LOCAL_LAYER, 0, 0)

    def refuse(message: str, parameters: dict) -> None:
        with pytest.raises(InputError, match=message):
            bind([Layers(parameters, [1])], model_groups(config), ShardRanks())

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
        bind([Layers(shapes, [1], first=True, last=False)], model_groups(config), ShardRanks())
