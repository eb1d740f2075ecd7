"""Ranks that must hold the same tokens, gradient norm and weights are asked whether they do."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_espo.collectives import control_device, gathered, on_rank_0
from megatron_espo.data.packing import MicroBatch, TrainSequence
from megatron_espo.rollout.checksum import tensor_checksum

Claims = dict[str, Any]
_NORM_TOLERANCE = 1e-5  # relative; every rank has it from the same all-reduce


class Disagreement(RuntimeError):
    """Ranks that should hold the same thing do not."""


def refuse_disagreement(claims: Claims) -> None:
    """Compare ``{what: value}``: all ranks that name a thing must have one value of it. One gather of objects to rank 0 and a broadcast.

    Raises:
        Disagreement: on every rank, with the values and who has them.
    """
    everyone = gathered(claims)
    on_rank_0(lambda: _compare(everyone))


def _compare(everyone: Sequence[Claims]) -> None:
    for what in sorted(set().union(*everyone)):
        holders: dict[Any, list[int]] = {}
        for rank, others in enumerate(everyone):
            if what in others:
                holders.setdefault(others[what], []).append(rank)
        if len(holders) > 1:
            values = "; ".join(f"{value} on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" for value, ranks in holders.items())
            raise Disagreement(f"{what}: expected the same on all ranks that have it, got {values}")


def data_claims(sequences: Sequence[TrainSequence], batches: Sequence[MicroBatch], groups) -> Claims:
    """Digests of a step's responses, which all ranks have, and of this rank's micro-batches, which tensor- and pipeline-parallel ranks share."""
    whole = hashlib.blake2b(digest_size=8)
    for s in sequences:
        mask = b"" if s.loss_mask is None else s.loss_mask
        for values in (s.prompt_ids, s.response_ids, s.rollout_logprobs, mask, np.float64(s.advantage)):
            whole.update(np.ascontiguousarray(values))
    own = hashlib.blake2b(digest_size=8)
    for batch in batches:
        for value in vars(batch).values():
            own.update(_flat(value) if isinstance(value, Tensor) else repr(value).encode())
    place = f"data-parallel rank {groups.dp.rank()}, context-parallel rank {groups.cp.rank()}"
    return {"the step's responses (digest)": whole.hexdigest(), f"micro-batches of {place} (digest)": own.hexdigest()}


def _flat(value: Tensor) -> np.ndarray:
    """The bytes of a tensor: hashlib takes one-dimensional buffers only."""
    return np.ascontiguousarray(value.cpu().numpy()).reshape(-1).view(np.uint8)


def refuse_other_norms(norm: float) -> None:
    """Disagreement where ranks have different gradient norms. One all-reduce of two numbers."""
    value = -1.0 if math.isnan(norm) else norm  # of a skipped update
    extremes = torch.tensor([value, -value], dtype=torch.float64, device=control_device())
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    highest, lowest = float(extremes[0]), -float(extremes[1])
    if highest - lowest > _NORM_TOLERANCE * abs(highest):
        refuse_disagreement({"gradient norm": norm})


def refuse_other_weights(chunks: Sequence[torch.nn.Module], groups) -> None:
    """Compare weights over the ranks that hold copies: data- and context-parallel ones all, tensor-parallel ones what is not cut, tied embeddings.

    Collective as :func:`refuse_disagreement`, twice where they differ: the second time names the tensor.
    """
    checksums = _weight_claims(chunks, groups)
    together: dict[str, list[int]] = {}
    for what, value in checksums.items():
        together.setdefault(what.partition(" of ")[2], []).append(value)
    try:
        refuse_disagreement({f"weights of {place}": sum(values) for place, values in together.items()})
    except Disagreement:
        refuse_disagreement(checksums)
        raise


@torch.no_grad()
def _weight_claims(chunks: Sequence[torch.nn.Module], groups) -> dict[str, int]:
    """``{"<name> of <place>": checksum}``: ranks with the same place hold the same."""
    claims = {}
    for number, chunk in enumerate(chunks):
        stage = f"pipeline stage {groups.pp.rank()}" + f" chunk {number}" * (len(chunks) > 1)
        for name, parameter in chunk.named_parameters():
            tensor_rank = f"tensor-parallel rank {groups.tp.rank()}"
            if not getattr(parameter, "allreduce", True):
                place = f"expert-parallel rank {groups.ep.rank()}, expert tensor rank {groups.expt_tp.rank()}, {stage}"
            elif getattr(parameter, "shared_embedding", False):
                name, place = "tied embedding", tensor_rank
            elif getattr(parameter, "tensor_model_parallel", False):
                place = f"{tensor_rank}, {stage}"
            else:
                place = stage
            claims[f"{name} of {place}"] = tensor_checksum(parameter)
    return claims
