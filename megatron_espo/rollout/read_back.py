"""Reads the weights with which vLLM computes back from its layers, in a worker process.

On a CPU vLLM packs the weight of a linear layer for its kernel and drops the original. Applied to
unit vectors, the kernel returns the weight's columns exactly, because each sum has one non-zero
term. The packing of experts is a permutation. vLLM's own packing function, applied to the numbers
0, 1, ..., gives this permutation.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm._custom_ops import cpu_prepack_moe_weight
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers import linear
from vllm.model_executor.layers import vocab_parallel_embedding as vocab
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from megatron_espo.distributed.checksum import tensor_checksum

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
    layers (also fused ones), embeddings, output layers, experts on a CPU (GPU kernels shuffle
    theirs) and parameters of other layers, such as norms.

    Args:
        dtype: of the tensors that were sent.
    """
    packed = getattr(model, "packed_modules_mapping", {})
    found: dict[str, int] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, linear.LinearBase | vocab.VocabParallelEmbedding):
            _add_matrix(found, name, layer, packed, dtype)
        elif isinstance(layer, RoutedExperts):
            _add_experts(found, layer, dtype)
        elif get_tensor_model_parallel_rank() == 0:
            for key, parameter in layer.named_parameters(recurse=False):
                if parameter.numel() and parameter.dim() <= 2:
                    found[f"{name}.{key}"] = tensor_checksum(parameter.to(dtype))
    return found


def _add_matrix(
    found: dict[str, int], name: str, layer: Any, packed: dict, dtype: torch.dtype
) -> None:
    parts, column = _parts(name, layer, packed), 0
    if isinstance(layer, linear.RowParallelLinear):
        column = layer.tp_rank * layer.input_size_per_partition
    for first, block in _column_blocks(layer) if parts else ():
        for part in parts:
            key, rows = f"{part.name}.weight", block[part.start : part.stop].to(dtype)
            checksum = tensor_checksum(rows, part.first_row, column + first)
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


def _add_experts(found: dict[str, int], layer: Any, dtype: torch.dtype) -> None:
    """Gate, up and down projection of each expert; vLLM packs and pads them in two tensors."""
    kernel, config = layer.quant_method.moe_kernel.fused_experts, layer.moe_config
    if not isinstance(kernel, CPUUnquantizedExperts):
        return
    isa = None if kernel._use_zentorch else kernel.isa
    size = config.intermediate_size_per_partition_unpadded
    first = config.moe_parallel_config.tp_rank * size
    experts = list(range(config.num_experts))
    if layer.expert_map is not None:
        experts = (layer.expert_map >= 0).nonzero().flatten().tolist()
    for expert, gate_up, down in zip(experts, layer.w13_weight, layer.w2_weight, strict=True):
        gate, up = (half[:size].to(dtype) for half in _unpack(gate_up, isa).chunk(2))
        down = _unpack(down, isa)[:, :size].to(dtype)
        prefix = f"{layer.layer_name}.{expert}"
        found[f"{prefix}.gate_proj.weight"] = tensor_checksum(gate, first)
        found[f"{prefix}.up_proj.weight"] = tensor_checksum(up, first)
        found[f"{prefix}.down_proj.weight"] = tensor_checksum(down, 0, first)


def _unpack(packed: Tensor, isa: str | None) -> Tensor:
    """An expert's matrix before vLLM packed it for the kernel of ``isa``; ``None``: not packed."""
    if isa is None:
        return packed
    matrix = torch.empty_like(packed)
    matrix.view(-1)[_packing_order(tuple(packed.shape), packed.dtype, isa)] = packed.view(-1)
    return matrix


@lru_cache(maxsize=8)
def _packing_order(shape: tuple[int, int], dtype: torch.dtype, isa: str) -> Tensor:
    """The original position of each element of a packed matrix."""
    word, base = {2: torch.int16, 4: torch.int32}[dtype.itemsize], 2**15
    positions = torch.arange(shape[0] * shape[1])
    digits = (
        part.to(word).view(dtype).view(1, *shape) for part in (positions // base, positions % base)
    )
    high, low = (cpu_prepack_moe_weight(part, isa).view(word).flatten().long() for part in digits)
    order = high * base + low
    if not torch.equal(order.sort().values, positions):
        raise RuntimeError(
            f"read-back: expected that vLLM's packing of experts for {isa} is a permutation, "
            "got other values"
        )
    return order
