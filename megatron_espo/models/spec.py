"""``ModelSpec``: a model, read from ``config.json`` and checked once. Standard library only."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

from megatron_espo.errors import InputError
from megatron_espo.models import mapping as rules
from megatron_espo.models.mapping import ParamMapping, ParamRule
from megatron_espo.models.rope import Rope, read_rope

SIZES = (
    "num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class Experts:
    """Routed experts of a model.

    Attributes:
        count: experts per layer.
        per_token: experts per token.
        ffn: feed-forward columns of one expert.
        normalized: whether the routing weights of a token sum to one (``norm_topk_prob``).
        layers: for each decoder layer, whether it has experts or a dense feed-forward.
        shared_ffn: feed-forward columns of the experts that every token takes; 0: there are none.
        is_biased: the weights are sigmoids. A bias, which no gradient trains, is added to choose
            experts.
        groups, top_groups: groups of experts, and the best of them, from which a token takes its
            experts.
        scale: factor of the routing weights.
    """

    count: int
    per_token: int
    ffn: int
    normalized: bool
    layers: tuple[bool, ...]
    shared_ffn: int = 0
    is_biased: bool = False
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0

    @property
    def indices(self) -> list[int]:
        """Indices of the layers with experts."""
        return [i for i, is_sparse in enumerate(self.layers) if is_sparse]

    def transformer_arguments(self) -> dict[str, Any]:
        """Arguments of Megatron's ``TransformerConfig``."""
        return {
            "num_moe_experts": self.count,
            "moe_ffn_hidden_size": self.ffn,
            # 1 declares a uniform stack, whose checkpoints load in any pipeline layout.
            "moe_layer_freq": 1 if all(self.layers) else [int(sparse) for sparse in self.layers],
            "moe_router_topk": self.per_token,
            # Weights that sum to one over the chosen experts are the softmax over their logits.
            "moe_router_pre_softmax": not self.normalized,
            "moe_router_score_function": "sigmoid" if self.is_biased else "softmax",
            "moe_router_enable_expert_bias": self.is_biased,
            "moe_router_num_groups": self.groups if self.groups > 1 else None,
            "moe_router_group_topk": self.top_groups if self.groups > 1 else None,
            "moe_router_topk_scaling_factor": self.scale,
            "moe_shared_expert_intermediate_size": self.shared_ffn or None,
            "moe_router_dtype": "fp32",
            # A balancing loss would change the weights even where every advantage is zero.
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
        }


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only model with RMSNorm, gated SiLU, rotary positions and grouped queries.

    A family is a subclass: it names its architecture, and overrides what differs from Llama.

    Attributes:
        architecture, model_type: of ``config.json``.
        required: keys of ``config.json`` that are positive integers.
        defaults: of keys that ``config.json`` may lack.
        partial_rotary: whether ``partial_rotary_factor`` may be below 1.
        has_bias_option: whether ``attention_bias`` is read.
        is_latent: whether keys and values of all heads come from one latent vector.
        post_norms: whether what attention and feed-forward add is normalized before (sandwich
            norms).
        attention_output: rule of the output projection.
        dense_mlp: rules of a dense feed-forward.
        always_windowed: whether ``sliding_window`` counts without ``use_sliding_window``.
        hf_config: content of ``config.json``, for a user's exporter.
        sliding_window: tokens that a token attends to; ``None``: all.
        experts: ``None`` for a dense model.
    """

    architecture: ClassVar[str]
    model_type: ClassVar[str]
    required: ClassVar[tuple[str, ...]] = SIZES
    defaults: ClassVar[dict[str, Any]] = {}
    partial_rotary: ClassVar[bool] = False
    has_bias_option: ClassVar[bool] = False
    is_latent: ClassVar[bool] = False
    post_norms: ClassVar[bool] = False
    attention_output: ClassVar[ParamRule] = rules.ATTENTION_OUTPUT
    dense_mlp: ClassVar[tuple[ParamRule, ...]] = (rules.GATE_UP, rules.DOWN)
    always_windowed: ClassVar[bool] = True

    hf_config: dict[str, Any]
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    sliding_window: int | None
    rope: Rope
    experts: Experts | None

    @classmethod
    def read(cls, hf: dict[str, Any]) -> Self:
        """Read the content of ``config.json``.

        Raises:
            InputError: lists every problem, one a line.
        """
        hf = cls.defaults | hf
        if found := list(cls.problems(hf)):
            raise InputError("\n".join(f"config.json: {problem}" for problem in found))
        heads, rope, sizes = hf["num_attention_heads"], read_rope(hf), {n: hf[n] for n in SIZES}
        if rope.yarn:  # as vLLM; max_position_embeddings may be that before or after the scaling
            keys = "yarn_original_max_position_embeddings", "yarn_rotary_scaling_factor"
            sizes["max_position_embeddings"] = int(math.prod(rope.yarn[key] for key in keys))
        is_windowed = hf.get("use_sliding_window", cls.always_windowed)
        return cls(
            hf_config=hf,
            **sizes,
            num_key_value_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            sliding_window=hf.get("sliding_window") if is_windowed else None,
            rope=rope,
            experts=cls.read_experts(hf),
        )

    @classmethod
    def read_experts(cls, hf: dict[str, Any]) -> Experts | None:
        """Read the experts. A family with experts overrides it."""
        return None

    @classmethod
    def problems(cls, hf: dict[str, Any]) -> Iterator[str]:
        """Yield what the package cannot train, and keys that contradict each other."""
        if missing := [key for key in cls.required if not _is_size(hf.get(key))]:
            yield f"expected positive integers {', '.join(missing)}, found none"
            return
        for key, expected in (("model_type", cls.model_type), ("hidden_act", "silu")):
            if (found := hf.get(key, expected)) != expected:
                yield f"{key}: expected {expected}, got {found!r}"
        heads, groups = hf["num_attention_heads"], hf.get("num_key_value_heads")
        if groups is not None and not (_is_size(groups) and heads % groups == 0):
            expected = f"a divisor of num_attention_heads ({heads})"
            yield f"num_key_value_heads: expected {expected}, got {groups!r}"
        head_dim, hidden = hf.get("head_dim"), hf["hidden_size"]
        if not _is_size(head_dim) and (head_dim is not None or hidden % heads):
            expected = f"a positive integer, or {heads} heads that divide hidden_size {hidden}"
            yield f"head_dim: expected {expected}, got {head_dim!r}"
        if hf.get("quantization_config"):
            yield "quantization_config: expected none; use the bfloat16 model"
        if hf.get("attention_bias") and not cls.has_bias_option:
            yield "attention_bias: expected false, got true"
        try:
            rope = read_rope(hf)
        except InputError as error:
            yield str(error)
            return
        if rope.share != 1 and not (cls.partial_rotary and not rope.yarn):
            expected = "1 with yarn" if cls.partial_rotary else "1"
            yield f"partial_rotary_factor: expected {expected}, got {rope.share}"

    def attention_rules(self) -> tuple[ParamRule, ...]:
        """Rules of the QKV projection, with its bias and norms."""
        has_bias = self.has_bias_option and self.hf_config.get("attention_bias")
        return (rules.QKV_WEIGHT, rules.QKV_BIAS) if has_bias else (rules.QKV_WEIGHT,)

    def layer_rules(self, layer: int) -> tuple[ParamRule, ...]:
        """Rules of a decoder layer, counted from 0."""
        mlp, experts = self.dense_mlp, self.experts
        if experts and experts.layers[layer]:
            bias = (rules.ROUTER_BIAS,) if experts.is_biased else ()
            mlp = (*rules.EXPERT_MLP, *bias, *(rules.SHARED_MLP if experts.shared_ffn else ()))
        post_norms = (rules.ATTENTION_POST_NORM, rules.MLP_POST_NORM) if self.post_norms else ()
        before = (rules.INPUT_NORM, *self.attention_rules())
        return (*before, self.attention_output, rules.MLP_NORM, *mlp, *post_norms)

    def transformer_arguments(self) -> dict[str, Any]:
        """Arguments of Megatron's ``TransformerConfig``, without the activation function."""
        attention = self.attention_rules()
        return {
            "num_layers": self.num_hidden_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.intermediate_size,
            "num_attention_heads": self.num_attention_heads,
            "num_query_groups": self.num_key_value_heads,
            "kv_channels": self.head_dim,
            "normalization": "RMSNorm",
            "layernorm_epsilon": self.rms_norm_eps,
            "qk_layernorm": rules.Q_NORM in attention,
            "gated_linear_unit": True,
            "add_bias_linear": False,
            "add_qkv_bias": rules.QKV_BIAS in attention,
        } | (self.experts.transformer_arguments() if self.experts else {})

    def cache_columns(self, gpus: int) -> int:
        """Elements of a token's keys and values in a layer of the engine, on one of its GPUs."""
        # vLLM replicates heads on more GPUs than heads.
        return 2 * max(1, self.num_key_value_heads // gpus) * self.head_dim

    def change_layer(self, layer: Any) -> None:
        """Change Megatron's ``ModuleSpec`` of a decoder layer in place, once for each object. For a
        user's own family.
        """

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Sizes, in elements, of the symbols that the rules use."""
        sizes = {
            "hidden": self.hidden_size,
            "query": self.num_attention_heads * self.head_dim,
            "value": self.num_attention_heads * self.head_dim,
            "key": self.num_key_value_heads * self.head_dim,
            "head_dim": self.head_dim,
            "ffn": self.intermediate_size,
            "gate_up": 2 * self.intermediate_size,
            "vocab": self.vocab_size,
        }
        if e := self.experts:
            sizes |= {"experts": e.count, "expert_ffn": e.ffn, "shared_ffn": e.shared_ffn}
        return sizes

    @cached_property
    def groups(self) -> list[list[ParamMapping]]:
        """All parameters: embedding, each decoder layer, final norm with output layer.

        vLLM's ``layerwise_groups`` groups the Hugging Face names in the same way.
        """
        layers = [
            [m for rule in self.layer_rules(i) for m in self._expand(rule, i)]
            for i in range(self.num_hidden_layers)
        ]
        embedding = rules.TIED_EMBEDDING if self.tie_word_embeddings else rules.EMBEDDING
        head = [] if self.tie_word_embeddings else self._expand(rules.OUTPUT)
        return [self._expand(embedding), *layers, self._expand(rules.FINAL_NORM) + head]

    def _expand(self, rule: ParamRule, layer: int | None = None) -> list[ParamMapping]:
        is_mlp = rule.layout is rules.ShardLayout.COLUMN and "linear_fc1" in rule.megatron[0]
        if is_mlp and self.transformer_arguments()["gated_linear_unit"]:
            # A rank would get rows of the gate, and another one those of the up projection.
            expected = "layout gated or fused_gated for gate and up projection"
            raise InputError(f"model.family: {rule.megatron[0]}: expected {expected}, got column")
        ours = "" if layer is None else f"decoder.layers.{layer}."
        theirs = "" if layer is None else f"model.layers.{layer}."
        count = self.experts.count if self.experts and "{expert}" in rule.megatron[0] else 0
        return [
            ParamMapping(
                megatron=tuple(ours + name for name in rule.megatron),
                huggingface=tuple(
                    (theirs + name.format(expert=expert), tuple(self.sizes[s] for s in shape))
                    for name, shape in rule.huggingface
                ),
                layout=rule.layout,
                query_groups=self.num_key_value_heads,
                expert=expert,
                num_experts=count,
                is_float32=rule.is_float32,
            )
            for expert in (range(count) if count else [None])
        ]

    @property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each Hugging Face tensor of the model."""
        return {n: shape for group in self.groups for m in group for n, shape in m.huggingface}


def is_unused(hf_config: dict[str, Any], name: str) -> bool:
    """Whether transformers and vLLM ignore a tensor: a tied head, rotary buffers of old exports,
    and layers that predict further tokens.
    """
    if name == "lm_head.weight":
        return bool(hf_config.get("tie_word_embeddings"))
    found = re.match(r"model\.layers\.(\d+)\.", name)
    keys = ("num_hidden_layers", "num_nextn_predict_layers")
    first, count = (hf_config.get(key) or 0 for key in keys)
    is_prediction = found is not None and first <= int(found[1]) < first + count
    return is_prediction or name.endswith("rotary_emb.inv_freq")


class ExternalSpec(ModelSpec):
    """A model that another library builds, loads and exports."""

    def build(self, path: str, arguments: dict[str, Any], groups: Any) -> list[Any]:
        """Build this rank's ``GPTModel`` chunks on the current device, with any weights.

        Args:
            path: the Hugging Face folder.
            arguments: fields of Megatron's ``TransformerConfig`` that the settings and the loss
                need.
            groups: Megatron's ``ProcessGroupCollection``.
        """
        raise NotImplementedError

    def load(self, chunks: Sequence[Any], path: str) -> None:
        """Read the weights of the folder into the chunks. Called on every rank at once."""
        raise NotImplementedError

    def export(self, chunks: Sequence[Any], path: str) -> Iterator[tuple[str, Any]]:
        """Yield (Hugging Face name, whole tensor), the same on every rank.

        Called on every rank at once, with the folder that the weights were read from.
        """
        raise NotImplementedError

    @property
    def groups(self) -> list[list[ParamMapping]]:  # type: ignore[override]
        raise InputError(
            f"model.family: expected a family of this package, got {type(self).__name__}: another "
            "library knows its parameters"
        )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
