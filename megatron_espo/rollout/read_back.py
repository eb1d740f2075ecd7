"""What vLLM really computes with: weights read back from its layers, in a worker process.

On a CPU vLLM repacks the weights of a linear layer for its kernel and drops the originals. The kernel itself gives them
back: applied to unit vectors it returns the weight's columns, exactly, because every sum has one term that is not zero.
The weights of experts are packed by a permutation, which vLLM's own function tells when it packs the numbers 0, 1, ...
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from vllm._custom_ops import cpu_prepack_moe_weight
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from megatron_espo.rollout.checksum import tensor_checksum

_PROBE_COLUMNS = 256


class Part(NamedTuple):
    """Rows ``start:stop`` of a layer's weight are rows ``first_row``, ... of the Hugging Face tensors ``name``."""

    name: str
    start: int
    stop: int
    first_row: int


@torch.no_grad()
def read_back_checksums(model: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """``tensor_checksum`` of this rank's part of each Hugging Face tensor, cast to ``dtype`` (that of the stream).

    The sums of all tensor-parallel ranks add up to the whole tensors'. Covered are linear layers (also fused ones),
    embeddings, output layers, experts on a CPU (GPU kernels shuffle theirs) and plain parameters such as norms.
    """
    packed = getattr(model, "packed_modules_mapping", {})
    found: dict[str, int] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LinearBase | VocabParallelEmbedding):
            _add_matrix(found, name, layer, packed, dtype)
        elif isinstance(layer, RoutedExperts):
            _add_experts(found, layer, dtype)
        else:
            for key, parameter in layer.named_parameters(recurse=False):
                if parameter.numel() and parameter.dim() <= 2 and get_tensor_model_parallel_rank() == 0:
                    found[f"{name}.{key}"] = tensor_checksum(parameter.to(dtype))
    return found


def _add_matrix(found: dict[str, int], name: str, layer: nn.Module, packed: dict, dtype: torch.dtype) -> None:
    parts = _parts(name, layer, packed)
    column = layer.tp_rank * layer.input_size_per_partition if isinstance(layer, RowParallelLinear) else 0
    for first, block in _column_blocks(layer) if parts else ():
        for part in parts:
            key, rows = f"{part.name}.weight", block[part.start : part.stop].to(dtype)
            found[key] = (found.get(key, 0) + tensor_checksum(rows, part.first_row, column + first)) % 2**64
    bias = getattr(layer, "bias", None)
    if isinstance(bias, Tensor) and column == 0:  # every rank of a row-parallel layer holds the whole bias
        for part in parts:
            found[f"{part.name}.bias"] = tensor_checksum(bias[part.start : part.stop].to(dtype), part.first_row)


def _parts(name: str, layer: nn.Module, packed: dict[str, list[str]]) -> list[Part]:
    """Where the rows of a layer's weight come from; rows that another rank accounts for too are left out."""
    if isinstance(layer, VocabParallelEmbedding):
        shard = layer.shard_indices
        return [Part(name, 0, shard.num_org_elements, shard.org_vocab_start_index)]
    replicated = layer.tp_size == 1 or isinstance(layer, ReplicatedLinear)
    if replicated and get_tensor_model_parallel_rank() > 0:
        return []
    prefix, _, last = name.rpartition(".")
    parts, start = [], 0
    for index, (own, size) in enumerate(zip(packed.get(last, [last]), layer.output_partition_sizes, strict=True)):
        rank = layer.tp_rank if isinstance(layer, ColumnParallelLinear) and not replicated else 0
        # Query heads are split over all ranks; with fewer key-value heads than ranks, neighbours hold copies.
        copies = getattr(layer, "num_kv_head_replicas", 1) if index else 1
        if rank % copies == 0:
            parts.append(Part(f"{prefix}.{own}", start, start + size, rank // copies * size))
        start += size
    return parts


def _column_blocks(layer: nn.Module) -> Iterator[tuple[int, Tensor]]:
    """(first column, ``[rows, columns]``) blocks that make up the weight that the layer multiplies with."""
    is_lookup = isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)
    if is_lookup or not hasattr(layer, "cpu_linear"):
        yield 0, layer.weight
        return
    is_head = isinstance(layer, ParallelLMHead)
    columns = layer.embedding_dim if is_head else getattr(layer, "input_size_per_partition", layer.input_size)
    dtype = layer.weight.dtype
    for first in range(0, columns, _PROBE_COLUMNS):
        count = min(_PROBE_COLUMNS, columns - first)
        unit = torch.zeros(count, columns, dtype=dtype)
        unit[torch.arange(count), torch.arange(first, first + count)] = 1
        yield first, layer.quant_method.apply(layer, unit).T


def _add_experts(found: dict[str, int], layer: RoutedExperts, dtype: torch.dtype) -> None:
    """Gate, up and down projection of each expert: vLLM holds a layer's in two tensors, padded and packed for the kernel."""
    kernel, config = layer.quant_method.moe_kernel.fused_experts, layer.moe_config
    if not isinstance(kernel, CPUUnquantizedExperts):
        return
    isa = None if kernel._use_zentorch else kernel.isa
    size = config.intermediate_size_per_partition_unpadded
    first = config.moe_parallel_config.tp_rank * size
    here = range(config.num_experts) if layer.expert_map is None else (layer.expert_map >= 0).nonzero().flatten().tolist()
    for expert, gate_up, down in zip(here, layer.w13_weight, layer.w2_weight, strict=True):
        gate, up = (half[:size].to(dtype) for half in _unpack(gate_up, isa).chunk(2))
        prefix = f"{layer.layer_name}.{expert}"
        found[f"{prefix}.gate_proj.weight"] = tensor_checksum(gate, first)
        found[f"{prefix}.up_proj.weight"] = tensor_checksum(up, first)
        found[f"{prefix}.down_proj.weight"] = tensor_checksum(_unpack(down, isa)[:, :size].to(dtype), 0, first)


def _unpack(packed: Tensor, isa: str | None) -> Tensor:
    """An expert's matrix as it was before vLLM packed it for the kernel of ``isa``; None: it did not."""
    if isa is None:
        return packed
    matrix = torch.empty_like(packed)
    matrix.view(-1)[_packing_order(tuple(packed.shape), packed.dtype, isa)] = packed.view(-1)
    return matrix


@lru_cache(maxsize=8)
def _packing_order(shape: tuple[int, int], dtype: torch.dtype, isa: str) -> Tensor:
    """For each element of a packed matrix its position in the original."""
    word, digit = {2: torch.int16, 4: torch.int32}[dtype.itemsize], 2**15
    positions = torch.arange(shape[0] * shape[1])
    digits = [part.to(word).view(dtype).view(1, *shape) for part in (positions // digit, positions % digit)]
    high, low = (cpu_prepack_moe_weight(part, isa).view(word).flatten().long() for part in digits)
    order = high * digit + low
    if not torch.equal(order.sort().values, positions):
        raise RuntimeError(f"vLLM's packing of experts for {isa} is no permutation; its weights cannot be read back")
    return order
