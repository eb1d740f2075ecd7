"""What one micro-batch leaves behind for its backward pass, tensor by tensor.

Attention is a fused kernel (Transformer Engine's, flash attention, or torch's on a CPU) everywhere: no T x T matrix is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_espo.config.experts import read_experts
from megatron_espo.weights.families import Mapping, model_sizes
from megatron_espo.weights.layouts import Layout

FLOAT32 = 4


@dataclass(frozen=True)
class Sharding:
    """What cuts an activation on one rank, and how it is kept."""

    tokens: int
    itemsize: int
    tp: int
    cp: int
    expert_tp: int
    sequence_parallel: bool
    transformer_engine: bool
    granularity: str | None

    @property
    def sp(self) -> int:
        """Ranks that share the hidden states between the linears."""
        return self.tp if self.sequence_parallel else 1


@dataclass(frozen=True)
class Sizes:
    """Features of one decoder layer, read off its naming table."""

    hidden: int
    query: int
    key: int
    head_dim: int
    heads: int
    qk_norm: bool
    ffn: int
    experts: int
    experts_per_token: int


def layer_sizes(layer: Sequence[Mapping], hf_config: dict[str, Any]) -> Sizes:
    """Sizes of the layer that ``layer`` (one of ``families.model_groups``) describes."""
    model = model_sizes(hf_config)
    experts = read_experts(hf_config)
    gates = [mapping for mapping in layer if mapping.layout is Layout.GATED]
    return Sizes(
        **{name: model[name] for name in ("hidden", "query", "key", "head_dim")},
        heads=hf_config["num_attention_heads"],
        qk_norm=any("q_norm" in name for mapping in layer for name, _ in mapping.huggingface),
        ffn=gates[0].huggingface[0][1][0],
        experts=len(gates) if len(gates) > 1 else 0,
        experts_per_token=experts.per_token if experts and len(gates) > 1 else 1,
    )


def norm_bytes(hidden: int, how: Sharding) -> float:
    """Kept by one RMSNorm over the residual stream, for each token: what it normalises, and what the next linear reads."""
    kept = how.itemsize * hidden if how.transformer_engine else 2 * FLOAT32 * hidden  # torch's norm works in float32
    return (kept + how.itemsize * hidden + FLOAT32) / how.sp


def layer_bytes(size: Sizes, how: Sharding) -> float:
    """Kept by one layer without full recomputation, for each token."""
    return 2 * norm_bytes(size.hidden, how) + _attention_bytes(size, how) + _mlp_bytes(size, how)


def _attention_bytes(size: Sizes, how: Sharding) -> float:
    q, k, b = size.query / how.tp, size.key / how.tp, how.itemsize
    # The value is a view of the projection's output and keeps all of it; rotated query and key are copies.
    kept = (q + 2 * k) * b + (q + k) * b
    kept += q * b  # what the output projection reads
    lse = size.heads / how.tp * FLOAT32
    if how.transformer_engine:
        kept += lse if how.granularity != "selective" else 0
        return kept + ((q + k) * b if size.qk_norm else 0)
    if how.granularity != "selective":
        kept += q * b + lse  # the kernel's own output, packed sequence by packed sequence
    if how.cp > 1:
        kept += 2 * k * how.cp * b  # keys and values of all context-parallel ranks
    kept += 4 * size.head_dim * b  # cosines and sines, for query and key
    return kept + (2 * FLOAT32 * (q + k) if size.qk_norm else 0)


def _mlp_bytes(size: Sizes, how: Sharding) -> float:
    """Gate and up projection (two widths), their product; without fused activation the gate's SiLU and a copy besides."""
    widths = 3 if how.transformer_engine else 5
    if not size.experts:
        return widths * size.ffn / how.tp * how.itemsize
    # Balanced routing: every rank computes as many copies of tokens as it has tokens x experts per token. They are kept
    # in the experts' order on the way in and on the way out.
    copies = size.experts_per_token * how.itemsize
    hidden = size.hidden / (1 if how.expert_tp == how.tp else how.sp)
    return copies * (2 * hidden + widths * size.ffn / how.tp) + size.experts * FLOAT32


def working_bytes(size: Sizes, how: Sharding) -> float:
    """Gradients alive at once inside one layer's backward pass, for each token."""
    wide = 2 * size.ffn * size.experts_per_token / how.tp
    # Under sequence parallelism the linears' inputs and gradients are gathered for the moment.
    return (wide + (2 if how.sequence_parallel else 1) * size.hidden) * how.itemsize


def checkpoint_bytes(size: Sizes, how: Sharding) -> float:
    """The input of a recomputed unit of layers, for each token."""
    return size.hidden / how.sp * how.itemsize


@dataclass(frozen=True)
class Stack:
    """A run of layers that goes forward and backward as one (a chunk of the pipeline).

    Attributes:
        kept_bytes: what one micro-batch leaves behind.
        backward_bytes: what its backward pass adds for the moment: recomputed activations and gradients.
    """

    kept_bytes: int
    backward_bytes: int


def stack_bytes(layers: Sequence[Sizes], how: Sharding, method: str | None, unit: int | None) -> Stack:
    """One micro-batch in a chunk of ``layers`` under the configured recomputation."""
    if not layers:
        return Stack(0, 0)
    full = [layer_bytes(size, how) for size in layers]
    working = max(working_bytes(size, how) for size in layers)
    if how.granularity != "full":
        return Stack(int(sum(full) * how.tokens), int(working * how.tokens))
    unit = min(unit or 1, len(layers))
    if method == "uniform":
        units = [full[start : start + unit] for start in range(0, len(layers), unit)]
        kept = len(units) * checkpoint_bytes(layers[0], how)
        again = max(map(sum, units))
    else:  # block: the first layers one by one, the others not at all
        kept = unit * checkpoint_bytes(layers[0], how) + sum(full[unit:])
        again = max(full[:unit])
    return Stack(int(kept * how.tokens), int((again + working) * how.tokens))
