"""Check that ranks hold the same tokens, gradient norm and weights where they must."""

import math
import zlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_espo.data.packing import MicroBatch, TrainSequence
from megatron_espo.distributed.checksum import array_checksum, tensor_checksum
from megatron_espo.distributed.collectives import control_device, gather_objects, on_rank_0

Fingerprints = dict[str, Any]
_NORM_TOLERANCE = 1e-5  # relative; every rank has the norm from the same all-reduce


class RankMismatch(RuntimeError):
    """Ranks that must hold the same value hold different ones."""


def check_fingerprints(own: Fingerprints) -> None:
    """Compare ``{name: value}`` over all ranks that have the name.

    Collectives: one gather of objects to rank 0 and one broadcast.

    Raises:
        RankMismatch: on every rank, with the values and their ranks.
    """
    everyone = gather_objects(own)
    on_rank_0(lambda: _compare(everyone))


def _compare(everyone: Sequence[Fingerprints]) -> None:
    for name in sorted(set().union(*everyone)):
        holders = defaultdict(list)
        for rank, fingerprints in enumerate(everyone):
            if name in fingerprints:
                holders[fingerprints[name]].append(rank)
        if len(holders) > 1:
            values = "; ".join(
                f"{value} on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
                for value, ranks in holders.items()
            )
            raise RankMismatch(f"{name}: expected the same on all ranks that have it, got {values}")


def data_fingerprints(
    sequences: Sequence[TrainSequence], batches: Sequence[MicroBatch], groups: Any
) -> Fingerprints:
    """Return checksums (CRC-32) of lengths, loss masks and advantages of a step's responses, and of
    this rank's micro-batches.

    All ranks have the same lengths, loss masks and advantages. Ranks with the same data- and
    context-parallel rank have the same micro-batches; without tensor and pipeline parallelism that
    is one rank, which needs no checksum.
    """
    whole = own = 0
    for s in sequences:
        scalars = np.array([len(s.prompt_ids), len(s.response_ids), s.advantage])
        whole = zlib.crc32(scalars.data, whole)
        if s.loss_mask is not None:
            whole = zlib.crc32(np.ascontiguousarray(s.loss_mask).data, whole)
    step = {"the step's lengths, loss masks and advantages (checksum)": whole}
    if groups.tp.size() * groups.pp.size() == 1:
        return step
    # The tensors of the micro-batches are views of a few large ones. Each of these takes one call.
    blocks = {}
    for value in (value for batch in batches for value in vars(batch).values()):
        if isinstance(value, Tensor):
            block = value if value._base is None else value._base
            blocks[id(block)] = block
        else:
            own = zlib.crc32(repr(value).encode(), own)
    for block in blocks.values():
        own = array_checksum(block.cpu().numpy(), own)
    ranks = f"data-parallel rank {groups.dp.rank()}, context-parallel rank {groups.cp.rank()}"
    return step | {f"micro-batches of {ranks} (checksum)": own}


def check_norms(norm: float) -> None:
    """Raise RankMismatch if gradient norms differ. One all-reduce of two numbers."""
    value = -1.0 if math.isnan(norm) else norm  # NaN: the update was skipped
    extremes = torch.tensor([value, -value], dtype=torch.float64, device=control_device())
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    highest, lowest = float(extremes[0]), -float(extremes[1])
    if highest - lowest > _NORM_TOLERANCE * abs(highest):
        check_fingerprints({"gradient norm": norm})


def check_weights(chunks: Sequence[torch.nn.Module], groups: Any) -> None:
    """Compare the weights of which several ranks hold copies.

    Data- and context-parallel ranks hold copies of all weights, tensor-parallel ranks of those that
    are not sharded, the first and last stage of tied embeddings. Collective as
    :func:`check_fingerprints`; a mismatch takes a second pass, which names the tensor.
    """
    checksums = _weight_fingerprints(chunks, groups)
    sums: dict[str, int] = defaultdict(int)
    for name, value in checksums.items():
        sums["weights of " + name.partition(" of ")[2]] += value
    try:
        check_fingerprints(dict(sums))
    except RankMismatch:
        check_fingerprints(checksums)
        raise


@torch.no_grad()
def _weight_fingerprints(chunks: Sequence[torch.nn.Module], groups: Any) -> dict[str, int]:
    """Return ``{"<name> of <ranks>": checksum}``, equal on ranks with the same key."""
    fingerprints = {}
    tensor_rank = f"tensor-parallel rank {groups.tp.rank()}"
    expert_rank = f"expert-parallel rank {groups.ep.rank()}"
    expert_rank += f", expert tensor rank {groups.expt_tp.rank()}"
    for number, chunk in enumerate(chunks):
        stage = f"pipeline stage {groups.pp.rank()}" + f" chunk {number}" * (len(chunks) > 1)
        for name, parameter in chunk.named_parameters():
            ranks = stage
            if not getattr(parameter, "allreduce", True):
                ranks = f"{expert_rank}, {stage}"
            elif getattr(parameter, "shared_embedding", False):
                name, ranks = "tied embedding", tensor_rank
            elif getattr(parameter, "tensor_model_parallel", False):
                ranks = f"{tensor_rank}, {stage}"
            fingerprints[f"{name} of {ranks}"] = tensor_checksum(parameter)
    return fingerprints
