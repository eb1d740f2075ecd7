"""Reads the weights with which vLLM computes back from its layers, in a worker process.

On a CPU vLLM packs the weight of a linear layer for its kernel and drops the original. Applied to
unit vectors, the kernel returns the weight's columns exactly, because each sum has one non-zero
term. The weights of experts are not read back: vLLM shuffles them for its kernels.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers import linear
from vllm.model_executor.layers import vocab_parallel_embedding as vocab

from megatron_espo.distributed.checksum import tensor_checksum
from megatron_espo.models.mapping import EXPERT_BIAS

_PROBE_COLUMNS = 256


class Part(NamedTuple):
    """Rows ``start:stop`` of a layer's weight are rows ``first_row``, ... of tensor ``name``."""

    name: str
    start: int
    stop: int
    first_row: int


@torch.no_grad()
def read_back_checksums(model: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """``tensor_checksum`` of this rank's part of each Hugging Face tensor, cast to ``dtype``.

    The sums of all tensor-parallel ranks add up to the checksum of the whole tensor. Covers linear
    layers (also fused ones), embeddings, output layers and parameters of other layers, such as
    norms; not experts.

    Args:
        dtype: of the tensors that were sent.
    """
    packed = getattr(model, "packed_modules_mapping", {})
    found: dict[str, int] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, linear.LinearBase | vocab.VocabParallelEmbedding):
            _add_matrix(found, name, layer, packed, dtype)
            bias = getattr(layer, EXPERT_BIAS, None)
            if bias is not None and get_tensor_model_parallel_rank() == 0:  # it is sent in float32
                found[f"{name}.{EXPERT_BIAS}"] = tensor_checksum(bias.float())
        elif get_tensor_model_parallel_rank() == 0:  # experts have three dimensions
            for key, parameter in layer.named_parameters(recurse=False):
                if parameter.numel() and parameter.dim() <= 2:
                    found[f"{name}.{key}"] = tensor_checksum(parameter.to(dtype))
    return found


def _add_matrix(
    found: dict[str, int], name: str, layer: Any, packed: dict, dtype: torch.dtype
) -> None:
    parts, column = _parts(name, layer, packed), 0
    # The checkpoint may have gate and up projection as one tensor, too.
    is_gated = len(parts) > 1 and isinstance(layer, linear.MergedColumnParallelLinear)
    if isinstance(layer, linear.RowParallelLinear):
        column = layer.tp_rank * layer.input_size_per_partition
    for first, block in _column_blocks(layer) if parts else ():
        for index, part in enumerate(parts):
            rows, places = block[part.start : part.stop].to(dtype), [(part.name, part.first_row)]
            if is_gated:
                places.append((name, sum(layer.output_sizes[:index]) + part.first_row))
            for tensor, row in places:
                key, checksum = f"{tensor}.weight", tensor_checksum(rows, row, column + first)
                found[key] = (found.get(key, 0) + checksum) % 2**64
    bias = getattr(layer, "bias", None)
    # Every rank of a row-parallel layer holds the whole bias; the first one counts it.
    if isinstance(bias, Tensor) and column == 0:
        for part in parts:
            rows = bias[part.start : part.stop].to(dtype)
            found[f"{part.name}.bias"] = tensor_checksum(rows, part.first_row)


def _parts(name: str, layer: Any, packed: dict[str, list[str]]) -> list[Part]:
    """The tensors in a layer's weight, without rows that another rank counts."""
    if isinstance(layer, vocab.VocabParallelEmbedding):
        shard = layer.shard_indices
        return [Part(name, 0, shard.num_org_elements, shard.org_vocab_start_index)]
    replicated = layer.tp_size == 1 or isinstance(layer, linear.ReplicatedLinear)
    if replicated and get_tensor_model_parallel_rank() > 0:
        return []
    rank = layer.tp_rank if isinstance(layer, linear.ColumnParallelLinear) and not replicated else 0
    prefix, _, last = name.rpartition(".")
    parts, start = [], 0
    sizes = zip(packed.get(last, [last]), layer.output_partition_sizes, strict=True)
    for index, (own, size) in enumerate(sizes):
        # With fewer key-value heads than ranks, neighbouring ranks hold copies of a head.
        copies = getattr(layer, "num_kv_head_replicas", 1) if index else 1
        if rank % copies == 0:
            parts.append(Part(f"{prefix}.{own}", start, start + size, rank // copies * size))
        start += size
    return parts


def _column_blocks(layer: Any) -> Iterator[tuple[int, Tensor]]:
    """(first column, ``[rows, columns]``) blocks of the weight that the layer multiplies with."""
    is_head = isinstance(layer, vocab.ParallelLMHead)
    is_lookup = isinstance(layer, vocab.VocabParallelEmbedding) and not is_head
    if is_lookup or not hasattr(layer, "cpu_linear"):
        yield 0, layer.weight
        return
    if is_head:
        columns = layer.embedding_dim
    else:
        columns = getattr(layer, "input_size_per_partition", layer.input_size)
    for first in range(0, columns, _PROBE_COLUMNS):
        count = min(_PROBE_COLUMNS, columns - first)
        unit = torch.zeros(count, columns, dtype=layer.weight.dtype)
        unit[torch.arange(count), torch.arange(first, first + count)] = 1
        yield first, layer.quant_method.apply(layer, unit).T
