"""Make Megatron's routers take the engine's experts."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_espo.models.spec import Experts


class ReplayedChoice:
    """Chooses the experts for one router.

    It replaces Megatron's ``RouterReplay``, which handles one micro-batch at a time. Scores,
    probabilities and their gradient remain the router's.

    Attributes:
        given: ``[tokens of this rank, top_k]`` experts of the current micro-batch; -1: the router
            chooses for this token; ``None``: the router chooses for all tokens.
        counts: ``[2]``: tokens of training passes for which the router would choose other experts,
            and tokens with given experts.
    """

    def __init__(self, device: torch.device) -> None:
        self.given: Tensor | None = None
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups=None, group_topk=None, default_compute_topk=None
    ) -> tuple[Tensor, Tensor]:
        """Return the chosen experts' scores and indices, ``[tokens, top_k]`` each.

        Megatron calls this with ``scores [tokens, experts]``.
        """
        values, own = default_compute_topk(scores, topk, num_groups, group_topk)
        if self.given is None:
            return values, own
        known = self.given[:, :1] >= 0
        chosen = torch.where(known, self.given.long(), own)
        # Scoring passes, and the first pass of a recomputed layer, have no gradient.
        if torch.is_grad_enabled():
            differ = (chosen.sort(1).values != own.sort(1).values).any(1)
            self.counts += torch.stack([differ.sum(), known.sum()])
        return scores.gather(1, chosen), chosen


class RouterReplay:
    """All routers of a rank's model chunks.

    Args:
        chunks: from :func:`megatron_espo.megatron.model.build_model`.
        experts: of the model.
        tp_group: tensor-parallel process group; sequence parallelism splits the tokens over it.
    """

    def __init__(self, chunks: Sequence[Any], experts: Experts, tp_group: Any) -> None:
        self._group = tp_group if chunks[0].config.sequence_parallel else None
        self._routers: dict[torch.nn.Module, list[tuple[int, ReplayedChoice]]] = {}
        for chunk in chunks:
            routers = self._routers[chunk] = []
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    module.router_replay = choice = ReplayedChoice(module.weight.device)
                    # Megatron counts layers from 1 over all stages. The given experts have no rows
                    # for layers without experts.
                    routers.append((sum(experts.layers[: module.layer_number - 1]), choice))

    def give(self, model: torch.nn.Module, experts: Tensor | None) -> None:
        """Set the experts (``MicroBatch.routed_experts``) of a chunk's routers until the next call.

        Zero collectives.
        """
        if experts is not None and self._group is not None:
            experts = experts.chunk(self._group.size())[self._group.rank()]
        for layer, choice in self._routers[unwrap_model(model)]:
            choice.given = None if experts is None else experts[:, layer]

    def follow(self, model: torch.nn.Module, experts: Tensor | None, output: Tensor) -> None:
        """Set the same experts again when the backward of ``output`` begins.

        Other micro-batches run in between, and a recomputed layer runs its router again.
        """
        if output.requires_grad:
            output.register_hook(lambda _: self.give(model, experts))

    def pop(self) -> dict[str, float]:
        """Return ``moe/router_mismatch`` since the last call, on every rank. One all-reduce."""
        total = torch.zeros(2, dtype=torch.int64, device=torch.cuda.current_device())
        for _, choice in chain.from_iterable(self._routers.values()):
            total += choice.counts
            choice.counts.zero_()
        dist.all_reduce(total)
        differ, given = total.tolist()
        return {"moe/router_mismatch": differ / given} if given else {}
