"""Which Hugging Face tensors make up which Megatron parameter: tables, no tensors.

A rule names one Megatron parameter (under every layer spec that spells it differently), the Hugging Face tensors it is
made of with their shapes in symbols, and how these lie in it. ``model_groups`` writes the rules out for one model.
"""

from dataclasses import dataclass
from typing import Any

from megatron_espo.config.experts import read_experts
from megatron_espo.errors import InputError
from megatron_espo.weights.layouts import Layout


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter, relative to its layer where it is in one.

    Attributes:
        megatron: its names; a model has exactly one of them on the stage that owns it. ``{expert}`` makes it one parameter
            for each expert and stands for the number that the expert has on its rank.
        huggingface: (name, shape in the symbols of ``model_sizes``) of each tensor it is made of, in Megatron's order.
            Here ``{expert}`` is the expert's number in the layer.
        layout: how these tensors lie in it and how tensor parallelism (for experts: expert tensor parallelism) cuts it.
    """

    megatron: tuple[str, ...]
    huggingface: tuple[tuple[str, tuple[str, ...]], ...]
    layout: Layout


@dataclass(frozen=True)
class Mapping:
    """A rule written out for one model, layer and (where it has one) expert: full names, sizes in elements.

    ``{expert}`` is left in Megatron's names, where its value depends on the expert-parallel rank; ``expert`` of
    ``num_experts`` counts in the layer and is ``None`` for what all tokens share.
    """

    megatron: tuple[str, ...]
    huggingface: tuple[tuple[str, tuple[int, ...]], ...]
    layout: Layout
    query_groups: int
    expert: int | None = None
    num_experts: int = 0


# Each second name is Transformer Engine's, which fuses the norm into the linear that follows it.
INPUT_NORM = Rule(
    ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    (("input_layernorm.weight", ("hidden",)),),
    Layout.REPLICATED,
)
QKV = Rule(
    ("self_attention.linear_qkv.weight",),
    (
        ("self_attn.q_proj.weight", ("query", "hidden")),
        ("self_attn.k_proj.weight", ("key", "hidden")),
        ("self_attn.v_proj.weight", ("key", "hidden")),
    ),
    Layout.QKV,
)
QKV_BIAS = Rule(
    ("self_attention.linear_qkv.bias",),
    (
        ("self_attn.q_proj.bias", ("query",)),
        ("self_attn.k_proj.bias", ("key",)),
        ("self_attn.v_proj.bias", ("key",)),
    ),
    Layout.QKV,
)
Q_NORM = Rule(("self_attention.q_layernorm.weight",), (("self_attn.q_norm.weight", ("head_dim",)),), Layout.REPLICATED)
K_NORM = Rule(("self_attention.k_layernorm.weight",), (("self_attn.k_norm.weight", ("head_dim",)),), Layout.REPLICATED)
ATTENTION_OUTPUT = Rule(
    ("self_attention.linear_proj.weight",), (("self_attn.o_proj.weight", ("hidden", "query")),), Layout.ROW
)
MLP_NORM = Rule(
    ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    (("post_attention_layernorm.weight", ("hidden",)),),
    Layout.REPLICATED,
)
GATE_UP = Rule(
    ("mlp.linear_fc1.weight",),
    (("mlp.gate_proj.weight", ("ffn", "hidden")), ("mlp.up_proj.weight", ("ffn", "hidden"))),
    Layout.GATED,
)
DOWN = Rule(("mlp.linear_fc2.weight",), (("mlp.down_proj.weight", ("hidden", "ffn")),), Layout.ROW)

ROUTER = Rule(("mlp.router.weight",), (("mlp.gate.weight", ("experts", "hidden")),), Layout.REPLICATED)
# Each second name is the grouped matrix product's: all experts of a rank in one module.
EXPERT_GATE_UP = Rule(
    ("mlp.experts.local_experts.{expert}.linear_fc1.weight", "mlp.experts.linear_fc1.weight{expert}"),
    (
        ("mlp.experts.{expert}.gate_proj.weight", ("expert_ffn", "hidden")),
        ("mlp.experts.{expert}.up_proj.weight", ("expert_ffn", "hidden")),
    ),
    Layout.GATED,
)
EXPERT_DOWN = Rule(
    ("mlp.experts.local_experts.{expert}.linear_fc2.weight", "mlp.experts.linear_fc2.weight{expert}"),
    (("mlp.experts.{expert}.down_proj.weight", ("hidden", "expert_ffn")),),
    Layout.ROW,
)

DENSE_LAYER = (INPUT_NORM, QKV, ATTENTION_OUTPUT, MLP_NORM, GATE_UP, DOWN)

QWEN3_ATTENTION = (INPUT_NORM, QKV, Q_NORM, K_NORM, ATTENTION_OUTPUT, MLP_NORM)

LAYERS: dict[str, tuple[Rule, ...]] = {
    "llama": DENSE_LAYER,
    "mistral": DENSE_LAYER,
    "qwen2": (INPUT_NORM, QKV, QKV_BIAS, ATTENTION_OUTPUT, MLP_NORM, GATE_UP, DOWN),
    "qwen3": (*QWEN3_ATTENTION, GATE_UP, DOWN),
    "qwen3_moe": (*QWEN3_ATTENTION, GATE_UP, DOWN),
}
"""Parameters of one decoder layer without experts, by the ``model_type`` of ``config.json``."""

EXPERT_LAYERS: dict[str, tuple[Rule, ...]] = {
    "qwen3_moe": (*QWEN3_ATTENTION, ROUTER, EXPERT_GATE_UP, EXPERT_DOWN),
}
"""Parameters of one decoder layer with experts."""

EMBEDDING = Rule(
    ("embedding.word_embeddings.weight",), (("model.embed_tokens.weight", ("vocab", "hidden")),), Layout.VOCAB
)
# With tied embeddings the last pipeline stage holds a second copy of the embedding under the output layer's name.
TIED_EMBEDDING = Rule(("embedding.word_embeddings.weight", "output_layer.weight"), EMBEDDING.huggingface, Layout.VOCAB)
FINAL_NORM = Rule(("decoder.final_layernorm.weight",), (("model.norm.weight", ("hidden",)),), Layout.REPLICATED)
OUTPUT = Rule(("output_layer.weight",), (("lm_head.weight", ("vocab", "hidden")),), Layout.VOCAB)


def is_tied(hf_config: dict[str, Any]) -> bool:
    """Whether input embedding and output layer are one matrix (false where ``config.json`` does not say)."""
    return bool(hf_config.get("tie_word_embeddings", False))


def model_sizes(hf_config: dict[str, Any]) -> dict[str, int]:
    """Extent in elements of every symbol that the rules use."""
    heads = hf_config["num_attention_heads"]
    head_dim = hf_config.get("head_dim") or hf_config["hidden_size"] // heads
    experts = read_experts(hf_config)
    return {
        "hidden": hf_config["hidden_size"],
        "query": heads * head_dim,
        "key": query_groups(hf_config) * head_dim,
        "head_dim": head_dim,
        "ffn": hf_config["intermediate_size"],
        "vocab": hf_config["vocab_size"],
    } | ({"experts": experts.count, "expert_ffn": experts.ffn} if experts else {})


def query_groups(hf_config: dict[str, Any]) -> int:
    """Number of key/value heads."""
    return hf_config.get("num_key_value_heads") or hf_config["num_attention_heads"]


def model_groups(hf_config: dict[str, Any]) -> list[list[Mapping]]:
    """Every parameter of the model: the embedding, then each decoder layer, then final norm and output layer.

    This is the partition that vLLM's ``layerwise_groups`` makes of the Hugging Face names.

    Args:
        hf_config: the content of ``config.json``.

    Raises:
        InputError: a ``model_type`` without a table.
    """
    family = hf_config.get("model_type")
    if family not in LAYERS:
        raise InputError(
            f"config.json: model_type is {family!r}; weights can be mapped for {', '.join(sorted(LAYERS))}. "
            "Choose a model of one of these families, or add its table to megatron_espo/weights/families.py"
        )
    sizes, groups, experts = model_sizes(hf_config), query_groups(hf_config), read_experts(hf_config)

    def write_out(rule: Rule, layer: int | None = None) -> list[Mapping]:
        megatron_prefix, hf_prefix = ("", "") if layer is None else (f"decoder.layers.{layer}.", f"model.layers.{layer}.")
        has_experts = "{expert}" in rule.megatron[0]
        return [
            Mapping(
                megatron=tuple(megatron_prefix + name for name in rule.megatron),
                huggingface=tuple(
                    (hf_prefix + name.format(expert=expert), tuple(sizes[symbol] for symbol in shape))
                    for name, shape in rule.huggingface
                ),
                layout=rule.layout,
                query_groups=groups,
                expert=expert,
                num_experts=experts.count if has_experts else 0,
            )
            for expert in (range(experts.count) if has_experts else [None])
        ]

    with_experts = experts.layers if experts else (False,) * hf_config["num_hidden_layers"]
    layers = [
        [m for rule in (EXPERT_LAYERS if sparse else LAYERS)[family] for m in write_out(rule, i)]
        for i, sparse in enumerate(with_experts)
    ]
    if is_tied(hf_config):
        return [write_out(TIED_EMBEDDING), *layers, write_out(FINAL_NORM)]
    return [write_out(EMBEDDING), *layers, write_out(FINAL_NORM) + write_out(OUTPUT)]
