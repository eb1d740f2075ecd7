"""Reads the weights with which vLLM computes back from its layers, in a worker process.

On a CPU vLLM packs the weight of a linear layer for its kernel and drops the original. Applied to
unit vectors, the kernel returns the weight's columns exactly, because each sum has one non-zero
term. The weights of experts are not read back: vLLM shuffles them for its kernels.

Quantized weights cannot equal what was sent. Their sketches are compared instead: the kernel is
applied to 16 vectors of random signs, which quantized activations hold exactly, because all entries
have the same magnitude. This covers every kernel, layout and scale of linear layers. Experts have
no such product, so their weights are dequantized if the kernel's layout is known.
"""

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers import linear
from vllm.model_executor.layers import vocab_parallel_embedding as vocab

from megatron_espo.distributed import checksum
from megatron_espo.models.mapping import EXPERT_BIAS

_PROBE_COLUMNS = 256
_HIGH_PRECISION = (torch.float32, torch.bfloat16, torch.float16)
# vLLM's expert kernels that keep the checkpoint's layout, and kernels with the halves of gate and
# up projection exchanged. The other kernels shuffle the weights.
_PLAIN_EXPERTS = ("TRITON", "BATCHED_TRITON", "VLLM_CUTLASS", "BATCHED_VLLM_CUTLASS")
_UP_BEFORE_GATE = ("FLASHINFER_CUTLASS",)
_SCALES = ("weight_scale", "weight_scale_inv", "scale")
_HUGE = 1e100  # stands for NaN and infinity, which JSON does not have


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
        for tensor, part in _checksums(name, layer, packed, dtype):
            found[tensor] = (found.get(tensor, 0) + part) % 2**64
    return found


def _checksums(
    name: str, layer: Any, packed: dict, dtype: torch.dtype
) -> Iterator[tuple[str, int]]:
    """(tensor, checksum of a part of it) of a layer, without parts that another rank counts."""
    is_first = get_tensor_model_parallel_rank() == 0
    if not isinstance(layer, linear.LinearBase | vocab.VocabParallelEmbedding):
        for key, parameter in layer.named_parameters(recurse=False):
            if is_first and parameter.numel() and parameter.dim() <= 2:  # experts have three
                yield f"{name}.{key}", checksum.tensor_checksum(parameter.to(dtype))
        return
    places, column = list(_places(name, layer, packed)), _columns(layer).start
    if places and not _is_quantized(getattr(layer, "weight", None)):
        for first, block in _column_blocks(layer):
            for tensor, rows, row in places:
                part = checksum.tensor_checksum(block[rows].to(dtype), row, column + first)
                yield f"{tensor}.weight", part
    bias = getattr(layer, "bias", None)
    # Every rank of a row-parallel layer holds the whole bias; the first one counts it.
    if isinstance(bias, Tensor) and column == 0:
        for tensor, rows, row in places:
            yield f"{tensor}.bias", checksum.tensor_checksum(bias[rows].to(dtype), row)
    expert_bias = getattr(layer, EXPERT_BIAS, None)
    if expert_bias is not None and is_first:  # it is sent in float32
        yield f"{name}.{EXPERT_BIAS}", checksum.tensor_checksum(expert_bias.float())


@torch.no_grad()
def read_back_sketches(
    model: nn.Module, dtype: torch.dtype, device: torch.device
) -> list[tuple[str, str, bool, list[float]]]:
    """Sketches of this rank's parts of the Hugging Face matrices, as the engine uses them.

    Args:
        dtype: of the activations.
        device: of the weights.

    Returns:
        For each part: the tensor's name, the dtype in memory, whether it has fewer bits than
        bfloat16, and the sketch (``tensor_sketch``). The sketches of all parts of a tensor, on all
        tensor-parallel ranks, add up to its sketch. Experts of kernels with an unknown layout are
        absent.
    """
    packed = getattr(model, "packed_modules_mapping", {})
    found: list[tuple[str, str, bool, list[float]]] = []

    def add(name: str, weight: Tensor | None, sketch: Tensor) -> None:
        values = sketch.nan_to_num(nan=_HUGE, posinf=_HUGE, neginf=-_HUGE).tolist()
        kind = "packed" if weight is None else str(weight.dtype).removeprefix("torch.")
        found.append((name, kind, _is_quantized(weight), values))

    for name, layer in model.named_modules():
        if isinstance(layer, linear.LinearBase | vocab.VocabParallelEmbedding):
            weight, kind = getattr(layer, "weight", None), dtype
            if weight is not None and not _is_quantized(weight):
                kind = weight.dtype  # the output layer and routers may be float32
            columns = _columns(layer)
            signs = checksum.column_signs(columns.start, len(columns), device)
            signs = signs.T.to(kind).contiguous()
            if _is_lookup(layer):
                products = nn.functional.linear(signs, cast(Tensor, weight)).T
            else:
                products = layer.quant_method.apply(layer, signs).T
            for tensor, rows, row in _places(name, layer, packed):
                add(f"{tensor}.weight", weight, checksum.sketch_rows(products[rows], row))
        elif hasattr(layer, "w13_weight"):
            for tensor, weight, part, row, column in _experts(name, layer):
                add(tensor, weight, checksum.tensor_sketch(part, row, column))
    return found


def _is_quantized(weight: Tensor | None) -> bool:
    return weight is None or weight.dtype not in _HIGH_PRECISION


def _experts(name: str, layer: Any) -> Iterator[tuple[str, Tensor, Tensor, int, int]]:
    """(tensor, weights in memory, dequantized float32 part, its first row and column)."""
    method, config = layer.quant_method, layer.moe_config
    backends = (getattr(method, f"{kind}_backend", None) for kind in ("fp8", "int8", "unquantized"))
    backend = next((backend.name for backend in backends if backend), "")
    if backend not in (*_PLAIN_EXPERTS, *_UP_BEFORE_GATE):
        return
    lower = "w1" if backend in _UP_BEFORE_GATE else "w3"
    size, hidden = config.intermediate_size_per_partition_unpadded, config.hidden_dim_unpadded
    prefix = name.removesuffix(".routed_experts").removesuffix("experts")
    for _, source, expert, shard in layer.get_expert_mapping():
        local = layer._map_global_expert_id_to_local_expert_id(expert)
        if local < 0:  # on another rank
            continue
        key, tensor = "w2" if shard == "w2" else "w13", f"{prefix}{source}weight"
        weight = getattr(layer, f"{key}_weight")
        scales = [s for end in _SCALES if (s := getattr(layer, f"{key}_{end}", None)) is not None]
        block = getattr(layer, "weight_block_size", None)
        whole = dequantize(weight[local], scales[0][local] if scales else None, block)
        if shard == "w2":
            yield tensor, weight, whole[:hidden, :size], 0, config.tp_rank * size
        else:
            start = whole.shape[0] // 2 * (shard == lower)
            yield tensor, weight, whole[start : start + size, :hidden], config.tp_rank * size, 0


def dequantize(weight: Tensor, scale: Tensor | None, block: list[int] | None) -> Tensor:
    """Return float32 ``weight`` (``[rows, columns]``) times its scales.

    Args:
        scale: one, one for each row (``[rows]`` or ``[rows, 1]``), one for each shard of rows, or
            one for each block; ``None``: 1.
        block: rows and columns of a block.
    """
    if scale is None:
        return weight.float()
    scale = scale.float().reshape(-1, 1) if scale.dim() < 2 else scale.float()
    rows, columns = block or map(math.ceil, (len(weight) / len(scale), weight.shape[1]))
    scale = scale.repeat_interleave(rows, 0)[: len(weight)]
    return weight.float() * scale.repeat_interleave(columns, 1)[:, : weight.shape[1]]


def _places(name: str, layer: Any, packed: dict) -> Iterator[tuple[str, slice, int]]:
    """(tensor, its rows in the layer's weight, its first row), without rows of other ranks."""
    if isinstance(layer, vocab.VocabParallelEmbedding):
        shard = layer.shard_indices
        yield name, slice(shard.num_org_elements), shard.org_vocab_start_index
        return
    replicated = layer.tp_size == 1 or isinstance(layer, linear.ReplicatedLinear)
    if replicated and get_tensor_model_parallel_rank() > 0:
        return
    rank = layer.tp_rank if isinstance(layer, linear.ColumnParallelLinear) and not replicated else 0
    prefix, _, last = name.rpartition(".")
    names, sizes = packed.get(last, [last]), layer.output_partition_sizes
    is_gated = len(names) > 1 and isinstance(layer, linear.MergedColumnParallelLinear)
    start = first = 0  # of the part: in this rank's rows, and in those of all ranks
    for index, size in enumerate(sizes):
        # With fewer key-value heads than ranks, neighbouring ranks hold copies of a head.
        copies = getattr(layer, "num_kv_head_replicas", 1) if index else 1
        if rank % copies == 0:
            rows, row = slice(start, start + size), rank // copies * size
            if len(names) == len(sizes):
                yield f"{prefix}.{names[index]}", rows, row
            if len(names) < len(sizes):  # the checkpoint has all parts as one tensor
                yield f"{prefix}.{names[0]}", rows, first + row
            elif is_gated:  # it may have gate and up projection as one tensor, too
                yield name, rows, first + row
        start += size
        first += size * (1 if replicated else layer.tp_size) // copies


def _is_lookup(layer: Any) -> bool:
    is_head = isinstance(layer, vocab.ParallelLMHead)
    return isinstance(layer, vocab.VocabParallelEmbedding) and not is_head


def _columns(layer: Any) -> range:
    """The columns of the whole tensor that this rank's layer holds."""
    if isinstance(layer, vocab.VocabParallelEmbedding):
        return range(layer.embedding_dim)
    count = getattr(layer, "input_size_per_partition", layer.input_size)
    first = layer.tp_rank * count if isinstance(layer, linear.RowParallelLinear) else 0
    return range(first, first + count)


def _column_blocks(layer: Any) -> Iterator[tuple[int, Tensor]]:
    """(first column, ``[rows, columns]``) blocks of the weight that the layer multiplies with."""
    if _is_lookup(layer) or not hasattr(layer, "cpu_linear"):
        yield 0, layer.weight
        return
    count = len(_columns(layer))
    for first in range(0, count, _PROBE_COLUMNS):
        places = torch.arange(first, min(first + _PROBE_COLUMNS, count))
        unit = nn.functional.one_hot(places, count).to(layer.weight.dtype)
        yield first, layer.quant_method.apply(layer, unit).T
