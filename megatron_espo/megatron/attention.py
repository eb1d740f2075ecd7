"""Layers for a machine without Transformer Engine: packed causal attention and RMSNorm.

Megatron's local attention refuses packed sequences, and its local norm refuses sequence
parallelism.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor


@dataclass
class SharedPrefixSeqParams(PackedSeqParams):
    """Packed sequences that may share prompts; fields as in ``MicroBatch``.

    ``position_ids`` is ``None`` without shared prompts.
    """

    prefix_groups: tuple[tuple[int, ...], ...] | None = None
    position_ids: Tensor | None = None


class SharedPrefixRotary(torch.nn.Module):
    """Megatron's rotary embedding, with the rows of each packed token's own position.

    Megatron applies a table as long as the packed batch row by row. For a shorter table it counts
    positions of each sequence from 0, which is wrong for a suffix after a shared prefix.
    """

    def __init__(self, rotary: torch.nn.Module) -> None:
        super().__init__()
        self.rotary: Any = rotary
        self._position_ids: Tensor | None = None

    def get_rotary_seq_len(
        self, inference_context, transformer, transformer_input, config, packed_seq_params=None
    ) -> int:
        """Return the rows of the table, and store the positions for the next call."""
        self._position_ids = getattr(packed_seq_params, "position_ids", None)
        return self.rotary.get_rotary_seq_len(
            inference_context, transformer, transformer_input, config, packed_seq_params
        )

    def forward(self, max_seq_len: int, *args, **kwargs) -> Any:
        """Return ``[tokens, 1, 1, head_dim]`` for shared prompts, else Megatron's table."""
        found = self.rotary(max_seq_len, *args, **kwargs)
        if self._position_ids is None:
            return found
        if isinstance(found, tuple):  # YaRN's has a factor beside the table
            return found[0][self._position_ids[0]], *found[1:]
        return found[self._position_ids[0]]


@lru_cache(maxsize=16)  # a mask of 7,000 by 9,000 tokens takes 63 MB
def _suffix_mask(length: int, total: int, device: torch.device) -> Tensor:
    """Return the causal mask ``[length, total]`` of the last ``length`` of ``total`` tokens."""
    return torch.ones(length, total, dtype=torch.bool, device=device).tril(total - length)


class PackedDotProductAttention(torch.nn.Module):
    """Causal attention in each sequence of a packed batch, by ``scaled_dot_product_attention``.

    Takes ``query [tokens, heads/tp, head_dim]``, ``key`` and ``value [tokens, groups/tp,
    head_dim]`` (THD) with ``packed_seq_params``, or ``[sequence, batch, heads/tp, head_dim]``
    (SBHD) without. Returns ``[tokens, heads/tp * head_dim]`` or ``[sequence, batch, heads/tp *
    head_dim]``.

    Under context parallelism each rank has two chunks of every sequence
    (``data/context_parallel.py``): keys and values are all-gathered over the group, their gradients
    reduce-scattered. Otherwise zero collectives.
    """

    def __init__(
        self, *, config, attn_mask_type, pg_collection, softmax_scale=None, **unused
    ) -> None:
        super().__init__()
        self.cp_group: Any = pg_collection.cp if config.context_parallel_size > 1 else None
        if config.attention_dropout:
            raise ValueError(
                "attention_dropout must be 0: old and new log-probs are compared token by token"
            )
        self.attn_mask_type = attn_mask_type
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend; see the class for shapes. ValueError for a mask that is not causal."""
        mask_type = attn_mask_type or self.attn_mask_type
        if mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
            raise ValueError(f"expected a causal mask type, got {mask_type}")
        if self.cp_group is not None:
            if packed_seq_params is not None:
                lengths = (packed_seq_params.cu_seqlens_q.diff() // self.cp_group.size()).tolist()
                return self._zigzag(query, key, value, lengths)
            # Rows become sequences of a packed batch: [s, b, n, d] -> [b s, n, d].
            rows, length = query.size(1), query.size(0)
            q, k, v = (tensor.transpose(0, 1).flatten(0, 1) for tensor in (query, key, value))
            output = self._zigzag(q, k, v, [length] * rows)
            return output.unflatten(0, (rows, length)).transpose(0, 1)
        if packed_seq_params is None:
            # [s, b, n, d] -> [b, n, s, d]
            output = self._causal(*(t.permute(1, 2, 0, 3) for t in (query, key, value)))
            return output.permute(2, 0, 1, 3).flatten(2)
        trees = getattr(packed_seq_params, "prefix_groups", None)
        if trees is None:
            trees = [(length,) for length in packed_seq_params.cu_seqlens_q.diff().tolist()]
        lengths = [length for tree in trees for length in tree]
        # [tokens, n, d] -> [1, n, tokens, d] of each prefix and suffix. One call for each: the work
        # is that of the true lengths, without padding.
        split = [t.transpose(0, 1)[None].split(lengths, dim=2) for t in (query, key, value)]
        parts = zip(*split, strict=True)
        outputs = []
        for tree in trees:
            prefix = next(parts)
            outputs.append(self._causal(*prefix))
            for _ in tree[1:]:
                q, k, v = next(parts)
                keys, values = torch.cat([prefix[1], k], dim=2), torch.cat([prefix[2], v], dim=2)
                outputs.append(self._causal(q, keys, values))
        return torch.cat(outputs, dim=2)[0].transpose(0, 1).flatten(1)

    def _zigzag(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        """Attend from this rank's chunks ``r`` and ``2 cp - 1 - r`` of each sequence.

        Args:
            query, key, value: ``[tokens, ...]`` of both chunks of all sequences.
            lengths: tokens of both chunks of each sequence.
        """
        rank, size = self.cp_group.rank(), self.cp_group.size()
        # Values of latent attention are narrower than keys.
        wide = F.pad(value, (0, key.size(-1) - value.size(-1)))
        local = torch.stack([key, wide], 1)
        gathered = gather_from_sequence_parallel_region(local, group=self.cp_group)
        whole = gathered.unflatten(0, (size, -1)).split(lengths, dim=1)
        outputs = []
        for q, kv in zip(query.split(lengths), whole, strict=True):
            early, late = kv.chunk(2, dim=1)
            # [size, chunk, 2, n, d]: first chunks in rank order, second chunks in reverse order
            # -> [2, 1, n, sequence, d]
            ordered = torch.cat([early, late.flip(0)]).flatten(0, 1)
            keys, values = ordered.permute(1, 2, 0, 3)[:, None]
            values = values[..., : value.size(-1)]
            chunks = q.transpose(0, 1)[None].chunk(2, dim=2)
            for number, part in zip((rank, 2 * size - 1 - rank), chunks, strict=True):
                seen = (number + 1) * early.size(1)
                outputs.append(self._causal(part, keys[:, :, :seen], values[:, :, :seen]))
        return torch.cat(outputs, dim=2)[0].transpose(0, 1).flatten(1)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend causally; the queries are at the last positions of the keys."""
        length, total = query.size(2), key.size(2)
        mask = None if length == total else _suffix_mask(length, total, query.device)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=query.size(1) != key.size(1),
        )


class LatentAttention(MLASelfAttention):
    """Megatron-Core's latent attention with the same parameters under each layer specification.

    All linear layers are column-parallel, the norms are modules. Megatron-Core 0.19 would need
    Transformer Engine for the norms, and normalize the input of an uncompressed query twice.
    """

    rotary_pos_emb: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rotary_pos_emb = SharedPrefixRotary(self.rotary_pos_emb)

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        return vars(submodules)

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return latent vectors with all columns, and the tokens of this rank's sequence shard.

        Megatron-Core 0.19 gathers the columns later. It then does not sum the gradient of the
        rotary key over the heads of all tensor-parallel ranks.
        """
        query, key_value = super()._qkv_down_projection(hidden_states)
        if self.config.tensor_model_parallel_size > 1:
            key_value = gather_from_tensor_model_parallel_region(key_value)
        if self.config.sequence_parallel:  # training with experts needs it
            key_value = scatter_to_sequence_parallel_region(key_value)
        return query, key_value


def use_latent_attention(layer: Any, norm: Any) -> None:
    """Change the specification of a decoder layer to :class:`LatentAttention` with ``norm``."""
    layer.submodules.self_attention.module = LatentAttention
    parts = layer.submodules.self_attention.submodules
    parts.q_layernorm = parts.kv_layernorm = norm
    parts.linear_q_down_proj = parts.linear_q_up_proj = parts.linear_q_proj
    parts.linear_kv_down_proj = parts.linear_kv_up_proj = parts.linear_q_proj


class RMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` for sequence parallelism.

    Megatron sums the gradient of a weight with ``sequence_parallel`` over tensor-parallel ranks.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **kwargs) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010


def add_post_norms(layers: Iterable[Any], norm: Any) -> None:
    """Normalize the outputs of each layer's attention and feed-forward (sandwich norms).

    Megatron-Core 0.19 has no norm at this place. The weights are ``post_layernorm.weight`` of
    ``linear_proj`` and ``linear_fc2``.

    Args:
        layers: Megatron's decoder layers.
        norm: class of the norm.
    """
    for layer in layers:
        for linear in (layer.self_attention.linear_proj, layer.mlp.linear_fc2):
            size, eps = layer.config.hidden_size, layer.config.layernorm_epsilon
            linear.post_layernorm = norm(config=layer.config, hidden_size=size, eps=eps)
            linear.register_forward_hook(_normalize_output)


def _normalize_output(linear: Any, _: Any, output: tuple[Tensor, None]) -> tuple[Tensor, None]:
    return linear.post_layernorm(output[0]), output[1]
