"""The engine's choice of experts in Megatron's routers, and the way of those choices from rank 0 to the ranks that train them."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_espo.config.experts import Experts
from megatron_espo.data.packing import TrainSequence, shard_by_tokens


class ReplayedChoice:
    """Chooses experts for one router, in the place of Megatron's own ``RouterReplay``, which knows one micro-batch at a time.

    Scores, probabilities and their gradient stay the router's: Megatron asks only which experts of a token to take.

    Attributes:
        given: ``[tokens of this rank, top_k]`` experts for the micro-batch that comes through; -1: the router's own; ``None``: all its own.
        counts: ``[2]`` tokens in training passes for which the router would have chosen others, and all that were given.
    """

    def __init__(self, device: torch.device) -> None:
        self.given: Tensor | None = None
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)

    def get_replay_topk(self, scores: Tensor, topk: int, num_groups=None, group_topk=None, default_compute_topk=None) -> tuple[Tensor, Tensor]:
        """Called by Megatron with ``[tokens, experts]`` scores: those of the chosen experts, and which they are, ``[tokens, top_k]`` each."""
        values, own = default_compute_topk(scores, topk, num_groups, group_topk)
        if self.given is None:
            return values, own
        known = self.given[:, :1] >= 0
        chosen = torch.where(known, self.given.long(), own)
        if torch.is_grad_enabled():  # scoring passes are left out, and of a recomputed layer the first pass
            differ = (chosen.sort(1).values != own.sort(1).values).any(1)
            self.counts += torch.stack([differ.sum(), known.sum()])
        return scores.gather(1, chosen), chosen


class RouterReplay:
    """All routers of a rank's model chunks.

    Args:
        chunks: from :func:`megatron_espo.mcore.model.build_model`.
        experts: the model's.
        tp_group: tensor-parallel process group, over whose ranks sequence parallelism cuts the tokens.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], experts: Experts, tp_group) -> None:
        self._group = tp_group if chunks[0].config.sequence_parallel else None
        self._routers: dict[torch.nn.Module, list[tuple[int, ReplayedChoice]]] = {}
        for chunk in chunks:
            routers = self._routers[chunk] = []
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    module.router_replay = ReplayedChoice(module.weight.device)
                    # Megatron counts layers from 1 over all stages; choices have no rows for layers without experts.
                    routers.append((sum(experts.layers[: module.layer_number - 1]), module.router_replay))

    def give(self, model: torch.nn.Module, experts: Tensor | None) -> None:
        """Have the routers of a chunk (wrapped or not) take these experts, ``MicroBatch.routed_experts``, until others are given. Zero collectives."""
        if experts is not None and self._group is not None:
            experts = experts.chunk(self._group.size())[self._group.rank()]
        for layer, choice in self._routers[unwrap_model(model)]:
            choice.given = None if experts is None else experts[:, layer]

    def follow(self, model: torch.nn.Module, experts: Tensor | None, output: Tensor) -> None:
        """Give the same experts again when the backward of ``output`` begins: other micro-batches come between, and layers may be recomputed."""
        if output.requires_grad:
            output.register_hook(lambda _: self.give(model, experts))

    def take(self) -> dict[str, float]:
        """``moe/router_mismatch`` since the last call, on every rank. One all-reduce of two numbers over all ranks."""
        total = torch.zeros(2, dtype=torch.int64, device=torch.cuda.current_device())
        for _, choice in chain.from_iterable(self._routers.values()):
            total += choice.counts
            choice.counts.zero_()
        dist.all_reduce(total)
        differ, given = total.tolist()
        return {"moe/router_mismatch": differ / given} if given else {}


def scatter_routed_experts(sequences: Sequence[TrainSequence], experts: Experts, groups, share_prompts: bool) -> list[TrainSequence]:
    """The sequences, those of this rank's data-parallel share with their routed experts, of which rank 0 has all.

    Collective over all ranks: for each sequence a message from rank 0 to the first rank of its data-parallel replica, and broadcasts from there
    over the context-, tensor- and pipeline-parallel groups.

    Args:
        sequences: the same on every rank but for the experts.
        experts: the model's.
        groups: Megatron's ``ProcessGroupCollection``.
        share_prompts: as given to :func:`megatron_espo.data.packing.pack`.

    Raises:
        ValueError: on rank 0, sequences without routed experts.
    """
    if dist.get_rank() == 0 and (missing := sum(sequence.routed_experts is None for sequence in sequences)):
        raise ValueError(f"router replay: expected routed_experts of every response, got none of {missing} of {len(sequences)}")
    per_rank = shard_by_tokens(sequences, groups.dp.size(), share_prompts)
    owners = {number: rank for rank, share in enumerate(per_rank) for tree in share for number in tree}
    dtype = np.dtype(np.uint8 if experts.count <= 256 else np.uint16)
    answer = list(sequences)
    for number, sequence in enumerate(sequences):
        if owners[number] == groups.dp.rank() or dist.get_rank() == 0:
            shape = (sequence.num_tokens - 1, sum(experts.layers), experts.per_token)
            data = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
            if dist.get_rank() == 0:
                data.numpy()[:] = np.ascontiguousarray(sequence.routed_experts, dtype).reshape(-1).view(np.uint8)
            data = _pass_on(data.to(torch.cuda.current_device()), owners[number], groups)
            answer[number] = replace(sequence, routed_experts=data.cpu().numpy().view(dtype).reshape(shape))
    return answer


def _pass_on(data: Tensor, owner: int, groups) -> Tensor:
    """Bring ``data`` from rank 0 to all ranks of a data-parallel replica. Called on these and on rank 0."""
    replica = (groups.cp, groups.tp, groups.pp)
    if dist.get_rank() == 0 and owner > 0:
        dist.send(data, dist.get_global_rank(groups.dp, owner))
        return data
    if owner > 0 and all(group.rank() == 0 for group in replica):
        dist.recv(data, src=0)
    for number, group in enumerate(replica):
        # Along one dimension after the other, each time from ranks that have it already.
        if all(later.rank() == 0 for later in replica[number + 1 :]):
            dist.broadcast(data, group=group, group_src=0)
    return data
