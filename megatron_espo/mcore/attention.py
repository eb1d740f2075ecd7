"""Layer-spec modules for where Transformer Engine is absent: packed causal attention and a norm that knows sequence parallelism.

Megatron's own local modules refuse packed sequences (attention) and sequence parallelism (norm). On GPUs with Transformer Engine
none of these is used.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor


@dataclass
class BranchedSeqParams(PackedSeqParams):
    """A packed batch in which responses share their prompt: see ``MicroBatch.branches`` and ``MicroBatch.position_ids``."""

    branches: tuple[tuple[int, ...], ...] = ()
    position_ids: Tensor | None = None


class BranchedRotary(torch.nn.Module):
    """Megatron's rotary embedding, one row for each packed token where branches start at positions of their own.

    Megatron takes a table as long as the packed batch row by row; otherwise it counts each sequence from 0.
    """

    def __init__(self, rotary: torch.nn.Module) -> None:
        super().__init__()
        self.rotary = rotary
        self._position_ids: Tensor | None = None

    def get_rotary_seq_len(self, inference_context, transformer, transformer_input, config, packed_seq_params=None) -> int:
        """Rows of the table; remembers the batch's positions for the call that follows."""
        self._position_ids = getattr(packed_seq_params, "position_ids", None)
        return self.rotary.get_rotary_seq_len(
            inference_context, transformer, transformer_input, config, packed_seq_params
        )

    def forward(self, max_seq_len: int, *args, **kwargs) -> Tensor:
        """``[tokens, 1, 1, head_dim]`` for a branched batch, else Megatron's ``[max_seq_len, 1, 1, head_dim]``."""
        table = self.rotary(max_seq_len, *args, **kwargs)
        return table if self._position_ids is None else table[self._position_ids[0]]


@lru_cache(maxsize=256)
def _branch_mask(length: int, total: int, device: torch.device) -> Tensor:
    """``[length, total]`` bool: the last ``length`` of ``total`` tokens, causally."""
    return torch.ones(length, total, dtype=torch.bool, device=device).tril(total - length)


class PackedDotProductAttention(torch.nn.Module):
    """Causal attention inside each sequence of a packed batch, through torch's fused ``scaled_dot_product_attention``.

    Takes ``query [tokens, heads/tp, head_dim]``, ``key`` and ``value [tokens, groups/tp, head_dim]`` (THD) with
    ``packed_seq_params.cu_seqlens_q``, or ``[sequence, batch, heads/tp, head_dim]`` (SBHD) without them. Returns ``[tokens, heads/tp *
    head_dim]`` or ``[sequence, batch, heads/tp * head_dim]``.

    Under context parallelism each rank has two chunks of every sequence (``data/context_parallel.py``): keys and values are all-gathered over
    the group, their gradients reduce-scattered. Otherwise zero collectives.
    """

    def __init__(
        self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, pg_collection=None, **kwargs
    ) -> None:
        super().__init__()
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None
        if config.attention_dropout:
            raise ValueError("attention_dropout must be 0: old and new log-probs are compared token by token")
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
        """Attend; see the class for shapes. Masks other than causal are refused."""
        if (attn_mask_type or self.attn_mask_type) not in (AttnMaskType.causal, AttnMaskType.padding_causal):
            raise ValueError(f"expected a causal mask type, got {attn_mask_type or self.attn_mask_type}")
        if self.cp_group is not None:
            return self._context_parallel(query, key, value, packed_seq_params)
        if packed_seq_params is None:
            # [s, b, n, d] -> [b, n, s, d]
            answer = self._causal(query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3))
            return answer.permute(2, 0, 1, 3).flatten(2)
        branches = getattr(packed_seq_params, "branches", None)
        if branches is None:
            branches = [(length,) for length in packed_seq_params.cu_seqlens_q.diff().tolist()]
        lengths = [length for tree in branches for length in tree]
        # [tokens, n, d] -> [1, n, tokens, d] of each trunk and branch. One call for each: the work is the sum over the true
        # lengths, with no padding.
        split = [tensor.transpose(0, 1)[None].split(lengths, dim=2) for tensor in (query, key, value)]
        parts = zip(*split, strict=True)
        pieces = []
        for tree in branches:
            trunk = next(parts)
            pieces.append(self._causal(*trunk))
            for _ in tree[1:]:
                q, k, v = next(parts)
                keys, values = torch.cat([trunk[1], k], dim=2), torch.cat([trunk[2], v], dim=2)
                pieces.append(self._causal(q, keys, values))
        return torch.cat(pieces, dim=2)[0].transpose(0, 1).flatten(1)

    def _context_parallel(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSeqParams | None) -> Tensor:
        if packed is None:
            # Rows become sequences of a packed batch: [s, b, n, d] -> [b s, n, d].
            rows, length = query.size(1), query.size(0)
            flat = (tensor.transpose(0, 1).flatten(0, 1) for tensor in (query, key, value))
            return self._zigzag(*flat, [length] * rows).unflatten(0, (rows, length)).transpose(0, 1)
        return self._zigzag(query, key, value, (packed.cu_seqlens_q.diff() // self.cp_group.size()).tolist())

    def _zigzag(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        """``[tokens, ...]`` of this rank's chunks ``r`` and ``2 cp - 1 - r`` of each sequence, of ``lengths`` tokens together."""
        rank, size = self.cp_group.rank(), self.cp_group.size()
        pieces, keys_of_ranks = [], gather_from_sequence_parallel_region(torch.stack([key, value], 1), group=self.cp_group)
        whole = keys_of_ranks.unflatten(0, (size, -1)).split(lengths, dim=1)
        for q, kv in zip(query.split(lengths), whole, strict=True):
            early, late = kv.chunk(2, dim=1)
            # [size, chunk, 2, n, d] of first chunks in rank order and second chunks in the opposite one -> [2, 1, n, sequence, d]
            keys, values = torch.cat([early, late.flip(0)]).flatten(0, 1).permute(1, 2, 0, 3)[:, None]
            chunk = early.size(1)
            for number, part in zip((rank, 2 * size - 1 - rank), q.transpose(0, 1)[None].chunk(2, dim=2), strict=True):
                seen = (number + 1) * chunk
                pieces.append(self._causal(part, keys[:, :, :seen], values[:, :, :seen]))
        return torch.cat(pieces, dim=2)[0].transpose(0, 1).flatten(1)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The queries are the last of the keys' positions."""
        grouped = query.size(1) != key.size(1)
        options = {"scale": self.scale, "enable_gqa": grouped}
        if query.size(2) == key.size(2):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
        mask = _branch_mask(query.size(2), key.size(2), query.device)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)


class RMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` whose weight's gradient Megatron sums over tensor-parallel ranks under sequence parallelism."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **kwargs) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
