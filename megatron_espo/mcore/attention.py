"""Layer-spec modules for where Transformer Engine is absent: packed causal attention and a norm that knows sequence parallelism.

Megatron's own local modules refuse packed sequences (attention) and sequence parallelism (norm). On GPUs with Transformer Engine
none of these is used.
"""

import math

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor


class PackedDotProductAttention(torch.nn.Module):
    """Causal attention inside each sequence of a packed batch, through torch's fused ``scaled_dot_product_attention``.

    Takes ``query [tokens, heads/tp, head_dim]``, ``key`` and ``value [tokens, groups/tp, head_dim]`` (THD) with
    ``packed_seq_params.cu_seqlens_q``, or ``[sequence, batch, heads/tp, head_dim]`` (SBHD) without them. Returns ``[tokens, heads/tp *
    head_dim]`` or ``[sequence, batch, heads/tp * head_dim]``. Zero collectives.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, softmax_scale=None, **kwargs) -> None:
        super().__init__()
        if config.context_parallel_size > 1:
            raise ValueError(
                "context_parallel_size > 1 needs Transformer Engine's attention (megatron.transformer_impl=transformer_engine)"
            )
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
        if packed_seq_params is None:
            # [s, b, n, d] -> [b, n, s, d]
            answer = self._causal(query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3))
            return answer.permute(2, 0, 1, 3).flatten(2)
        borders = packed_seq_params.cu_seqlens_q.tolist()
        lengths = [end - start for start, end in zip(borders, borders[1:], strict=False)]
        # One call per sequence: the work is the sum of squares of the true lengths, with no padding and no mask in memory.
        pieces = [
            self._causal(q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None])[0].transpose(0, 1)
            for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        ]
        return torch.cat(pieces).flatten(1)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = query.size(1) != key.size(1)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale, enable_gqa=grouped)


class RMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` whose weight's gradient Megatron sums over tensor-parallel ranks under sequence parallelism."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **kwargs) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
