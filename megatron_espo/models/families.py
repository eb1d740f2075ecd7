"""Tables that map Hugging Face tensors to Megatron parameters. They contain names, no tensors.

A ``ParamRule`` names one Megatron parameter, its Hugging Face tensors with symbolic shapes, and its
layout. ``model_groups`` expands the rules for one model.
"""

from dataclasses import dataclass
from typing import Any

from megatron_espo.errors import InputError
from megatron_espo.models.experts import read_experts
from megatron_espo.models.layouts import ShardLayout


@dataclass(frozen=True)
class ParamRule:
    """One Megatron parameter. Names are relative to the decoder layer, if it is in one.

    Attributes:
        layout: order of the tensors in it and how TP (for experts: expert TP) shards it.
        megatron: alternative names under different layer specs. A model has exactly one of them, on
            the stage that owns it. ``{expert}`` is the index of the expert on its rank.
        huggingface: (name, shape in the symbols of ``model_sizes``) of each tensor, in Megatron's
            order. ``{expert}`` is the index of the expert in the layer.

    Raises:
        ValueError: the layout needs another number of tensors. A fused tensor such as
            ``gate_up_proj`` must be split into its parts first.
    """

    layout: ShardLayout
    megatron: tuple[str, ...]
    huggingface: tuple[tuple[str, tuple[str, ...]], ...]

    def __post_init__(self) -> None:
        if len(self.huggingface) != self.layout.num_sources:
            names = ", ".join(name for name, _ in self.huggingface)
            raise ValueError(
                f"{self.megatron[0]}: expected {self.layout.num_sources} Hugging Face tensors for "
                f"layout {self.layout.value}, got {len(self.huggingface)} ({names}); split a fused "
                "tensor into its parts"
            )


@dataclass(frozen=True)
class ParamMapping:
    """A rule expanded for one model, layer and expert: full names, sizes in elements.

    ``megatron`` still contains ``{expert}``, because its value depends on the expert-parallel rank.
    ``expert`` is an index in the layer, out of ``num_experts``; ``None`` for other parameters.
    """

    megatron: tuple[str, ...]
    huggingface: tuple[tuple[str, tuple[int, ...]], ...]
    layout: ShardLayout
    query_groups: int
    expert: int | None = None
    num_experts: int = 0


def _rule(layout: ShardLayout, megatron: str, huggingface: dict[str, str]) -> ParamRule:
    """A rule from ``megatron`` names and ``{name: shape}``. Spaces separate names and symbols."""
    tensors = ((name, tuple(shape.split())) for name, shape in huggingface.items())
    return ParamRule(layout, tuple(megatron.split()), tuple(tensors))


REPLICATED, ROW, VOCAB = ShardLayout.REPLICATED, ShardLayout.ROW, ShardLayout.VOCAB
QKV, GATED = ShardLayout.QKV, ShardLayout.GATED

# Transformer Engine uses the second name: it fuses the norm into the next linear layer.
INPUT_NORM = _rule(
    REPLICATED,
    "input_layernorm.weight self_attention.linear_qkv.layer_norm_weight",
    {"input_layernorm.weight": "hidden"},
)
MLP_NORM = _rule(
    REPLICATED,
    "pre_mlp_layernorm.weight mlp.linear_fc1.layer_norm_weight",
    {"post_attention_layernorm.weight": "hidden"},
)
QKV_WEIGHT = _rule(
    QKV,
    "self_attention.linear_qkv.weight",
    {
        "self_attn.q_proj.weight": "query hidden",
        "self_attn.k_proj.weight": "key hidden",
        "self_attn.v_proj.weight": "key hidden",
    },
)
QKV_BIAS = _rule(
    QKV,
    "self_attention.linear_qkv.bias",
    {
        "self_attn.q_proj.bias": "query",
        "self_attn.k_proj.bias": "key",
        "self_attn.v_proj.bias": "key",
    },
)
Q_NORM, K_NORM = (
    _rule(
        REPLICATED,
        f"self_attention.{x}_layernorm.weight",
        {f"self_attn.{x}_norm.weight": "head_dim"},
    )
    for x in "qk"
)
ATTENTION_OUTPUT = _rule(
    ROW, "self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "hidden query"}
)
GATE_UP = _rule(
    GATED,
    "mlp.linear_fc1.weight",
    {"mlp.gate_proj.weight": "ffn hidden", "mlp.up_proj.weight": "ffn hidden"},
)
DOWN = _rule(ROW, "mlp.linear_fc2.weight", {"mlp.down_proj.weight": "hidden ffn"})

ROUTER = _rule(REPLICATED, "mlp.router.weight", {"mlp.gate.weight": "experts hidden"})
# The grouped matrix product uses the second name: all experts of a rank are in one module.
_EXPERT = "mlp.experts.local_experts.{{expert}}.{0}.weight mlp.experts.{0}.weight{{expert}}"
EXPERT_GATE_UP = _rule(
    GATED,
    _EXPERT.format("linear_fc1"),
    {
        "mlp.experts.{expert}.gate_proj.weight": "expert_ffn hidden",
        "mlp.experts.{expert}.up_proj.weight": "expert_ffn hidden",
    },
)
EXPERT_DOWN = _rule(
    ROW,
    _EXPERT.format("linear_fc2"),
    {"mlp.experts.{expert}.down_proj.weight": "hidden expert_ffn"},
)

DENSE_LAYER = (INPUT_NORM, QKV_WEIGHT, ATTENTION_OUTPUT, MLP_NORM, GATE_UP, DOWN)

QWEN3_ATTENTION = (INPUT_NORM, QKV_WEIGHT, Q_NORM, K_NORM, ATTENTION_OUTPUT, MLP_NORM)

LAYERS: dict[str, tuple[ParamRule, ...]] = {
    "llama": DENSE_LAYER,
    "mistral": DENSE_LAYER,
    "qwen2": (INPUT_NORM, QKV_WEIGHT, QKV_BIAS, ATTENTION_OUTPUT, MLP_NORM, GATE_UP, DOWN),
    "qwen3": (*QWEN3_ATTENTION, GATE_UP, DOWN),
    "qwen3_moe": (*QWEN3_ATTENTION, GATE_UP, DOWN),
}
"""Rules of a dense decoder layer, by the ``model_type`` of ``config.json``."""

EXPERT_LAYERS: dict[str, tuple[ParamRule, ...]] = {
    "qwen3_moe": (*QWEN3_ATTENTION, ROUTER, EXPERT_GATE_UP, EXPERT_DOWN),
}
"""Rules of a decoder layer with experts."""

EMBEDDING = _rule(
    VOCAB, "embedding.word_embeddings.weight", {"model.embed_tokens.weight": "vocab hidden"}
)
# With tied embeddings the last pipeline stage holds a copy of the embedding under the second name.
TIED_EMBEDDING = _rule(
    VOCAB,
    "embedding.word_embeddings.weight output_layer.weight",
    {"model.embed_tokens.weight": "vocab hidden"},
)
FINAL_NORM = _rule(REPLICATED, "decoder.final_layernorm.weight", {"model.norm.weight": "hidden"})
OUTPUT = _rule(VOCAB, "output_layer.weight", {"lm_head.weight": "vocab hidden"})


def is_tied(hf_config: dict[str, Any]) -> bool:
    """Whether input embedding and output layer share one matrix. Default: false."""
    return bool(hf_config.get("tie_word_embeddings", False))


def model_sizes(hf_config: dict[str, Any]) -> dict[str, int]:
    """Sizes, in elements, of the symbols that the rules use."""
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


def model_groups(hf_config: dict[str, Any]) -> list[list[ParamMapping]]:
    """Expand the rules for one model: embedding, each decoder layer, final norm with output layer.

    vLLM's ``layerwise_groups`` groups the Hugging Face names in the same way.

    Args:
        hf_config: content of ``config.json``.

    Returns:
        The groups, in the order above.

    Raises:
        InputError: no table for the ``model_type``.
    """
    family = hf_config.get("model_type")
    if family not in LAYERS:
        known = ", ".join(sorted(LAYERS))
        advice = (
            "use a model of one of these families, or add it to megatron_espo/models/families.py"
        )
        raise InputError(f"config.json: model_type is {family!r}; expected {known}; {advice}")
    sizes, groups = model_sizes(hf_config), query_groups(hf_config)
    experts = read_experts(hf_config)

    def expand(rule: ParamRule, layer: int | None = None) -> list[ParamMapping]:
        ours, theirs = "", ""
        if layer is not None:
            ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        count = experts.count if experts and "{expert}" in rule.megatron[0] else 0
        return [
            ParamMapping(
                megatron=tuple(ours + name for name in rule.megatron),
                huggingface=tuple(
                    (theirs + name.format(expert=expert), tuple(sizes[symbol] for symbol in shape))
                    for name, shape in rule.huggingface
                ),
                layout=rule.layout,
                query_groups=groups,
                expert=expert,
                num_experts=count,
            )
            for expert in (range(count) if count else [None])
        ]

    with_experts = experts.layers if experts else (False,) * hf_config["num_hidden_layers"]
    layers = [
        [m for rule in (EXPERT_LAYERS if sparse else LAYERS)[family] for m in expand(rule, i)]
        for i, sparse in enumerate(with_experts)
    ]
    if is_tied(hf_config):
        return [expand(TIED_EMBEDDING), *layers, expand(FINAL_NORM)]
    return [expand(EMBEDDING), *layers, expand(FINAL_NORM) + expand(OUTPUT)]


def tensor_shapes(hf_config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of each Hugging Face tensor of the model. Raises as :func:`model_groups`."""
    return {
        name: shape
        for group in model_groups(hf_config)
        for mapping in group
        for name, shape in mapping.huggingface
    }


def ignored_tensors(hf_config: dict[str, Any]) -> set[str]:
    """Tensors that transformers ignores: a tied head, and rotary buffers of old exports."""
    layers = range(hf_config["num_hidden_layers"])
    rotary = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in layers}
    return rotary | ({"lm_head.weight"} if is_tied(hf_config) else set())
