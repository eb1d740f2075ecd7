"""Rules that map Hugging Face tensors to Megatron parameters. They contain names, no tensors.

A ``ParamRule`` names one Megatron parameter, its Hugging Face tensors with symbolic shapes, and its
layout. ``ModelSpec.groups`` expands the rules for one model.
"""

from dataclasses import dataclass, replace

from megatron_espo.models.layouts import ShardLayout


@dataclass(frozen=True)
class ParamRule:
    """One Megatron parameter. Names are relative to the decoder layer, if it is in one.

    Attributes:
        layout: order of the tensors in it and how TP (for experts: expert TP) shards it.
        megatron: alternative names under different layer specs. A model has exactly one of them, on
            the stage that owns it. ``{expert}`` is the index of the expert on its rank.
        huggingface: (name, shape in the symbols of ``ModelSpec.sizes``) of each tensor, in
            Megatron's order. ``{expert}`` is the index of the expert in the layer.
        is_float32: whether trainer and engine have it in float32, whatever the model's dtype.

    Raises:
        ValueError: the layout needs another number of tensors. ``FUSED_GATE_UP`` is the rule of
            gate and up projection in one tensor.
    """

    layout: ShardLayout
    megatron: tuple[str, ...]
    huggingface: tuple[tuple[str, tuple[str, ...]], ...]
    is_float32: bool = False

    def __post_init__(self) -> None:
        if len(self.huggingface) != self.layout.num_sources:
            expected = f"{self.layout.num_sources} tensors for layout {self.layout.value}"
            got = f"{len(self.huggingface)} ({self.huggingface})"
            advice = "layout fused_gated takes gate and up projection as one tensor"
            raise ValueError(f"{self.megatron[0]}: expected {expected}, got {got}; {advice}")


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
    expert: int | None
    num_experts: int
    is_float32: bool


def make_rule(layout: ShardLayout, megatron: str, huggingface: dict[str, str]) -> ParamRule:
    """A rule from ``megatron`` names and ``{name: shape}``. Spaces separate names and symbols."""
    tensors = ((name, tuple(shape.split())) for name, shape in huggingface.items())
    return ParamRule(layout, tuple(megatron.split()), tuple(tensors))


REPLICATED, ROW, VOCAB = ShardLayout.REPLICATED, ShardLayout.ROW, ShardLayout.VOCAB


def make_norm(megatron: str, huggingface: str, size: str = "hidden") -> ParamRule:
    """A rule of a norm's weight of ``size`` elements, equal on every rank."""
    return make_rule(REPLICATED, megatron, {f"{huggingface}.weight": size})


def _qkv(kind: str, columns: str = "") -> ParamRule:
    rows = {"q": "query", "k": "key", "v": "key"}
    theirs = {f"self_attn.{x}_proj.{kind}": f"{size} {columns}" for x, size in rows.items()}
    return make_rule(ShardLayout.QKV, f"self_attention.linear_qkv.{kind}", theirs)


def _gated_mlp(megatron: str, huggingface: str, size: str) -> tuple[ParamRule, ParamRule]:
    """Rules of gate and up projection, and of the down projection, with ``size`` features."""
    up = {f"{huggingface}.{name}_proj.weight": f"{size} hidden" for name in ("gate", "up")}
    down = {f"{huggingface}.down_proj.weight": f"hidden {size}"}
    return (
        make_rule(ShardLayout.GATED, megatron.format("linear_fc1"), up),
        make_rule(ROW, megatron.format("linear_fc2"), down),
    )


# Transformer Engine uses the second name: it fuses the norm into the next linear layer.
INPUT_NORM = make_norm(
    "input_layernorm.weight self_attention.linear_qkv.layer_norm_weight", "input_layernorm"
)
MLP_NORM = make_norm(
    "pre_mlp_layernorm.weight mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm"
)
# Norms of what a layer's attention and feed-forward add to the residual (sandwich norms).
ATTENTION_POST_NORM = make_norm(
    "self_attention.linear_proj.post_layernorm.weight", "post_self_attn_layernorm"
)
MLP_POST_NORM = make_norm("mlp.linear_fc2.post_layernorm.weight", "post_mlp_layernorm")
FINAL_NORM = make_norm("decoder.final_layernorm.weight", "model.norm")

QKV_WEIGHT, QKV_BIAS = _qkv("weight", "hidden"), _qkv("bias")
Q_NORM = make_norm("self_attention.q_layernorm.weight", "self_attn.q_norm", "head_dim")
K_NORM = make_norm("self_attention.k_layernorm.weight", "self_attn.k_norm", "head_dim")
ATTENTION_OUTPUT = make_rule(
    ROW, "self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "hidden value"}
)

GATE_UP, DOWN = _gated_mlp("mlp.{}.weight", "mlp", "ffn")
FUSED_GATE_UP = make_rule(
    ShardLayout.FUSED_GATED, "mlp.linear_fc1.weight", {"mlp.gate_up_proj.weight": "gate_up hidden"}
)
SHARED_MLP = _gated_mlp("mlp.shared_experts.{}.weight", "mlp.shared_experts", "shared_ffn")
ROUTER = make_rule(REPLICATED, "mlp.router.weight", {"mlp.gate.weight": "experts hidden"})
# The grouped matrix product uses the second name: all experts of a rank are in one module.
_EXPERT = "mlp.experts.local_experts.{{expert}}.{0}.weight mlp.experts.{0}.weight{{expert}}"
EXPERT_MLP = (ROUTER, *_gated_mlp(_EXPERT, "mlp.experts.{expert}", "expert_ffn"))
# Added to the routers' scores to choose experts. Rounded to bfloat16 it would choose others.
EXPERT_BIAS = "e_score_correction_bias"
ROUTER_BIAS = replace(
    make_rule(REPLICATED, "mlp.router.expert_bias", {f"mlp.gate.{EXPERT_BIAS}": "experts"}),
    is_float32=True,
)

_EMBED_TOKENS = {"model.embed_tokens.weight": "vocab hidden"}
EMBEDDING = make_rule(VOCAB, "embedding.word_embeddings.weight", _EMBED_TOKENS)
# With tied embeddings the last pipeline stage holds a copy of the embedding under the second name.
TIED_EMBEDDING = make_rule(
    VOCAB, "embedding.word_embeddings.weight output_layer.weight", _EMBED_TOKENS
)
OUTPUT = make_rule(VOCAB, "output_layer.weight", {"lm_head.weight": "vocab hidden"})
