"""Megatron's shards as one stream of whole, Hugging-Face-named tensors."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_espo.errors import InputError
from megatron_espo.weights.binding import Bound, Place, bind
from megatron_espo.weights.families import Mapping, model_groups
from megatron_espo.weights.layouts import merge_into


@dataclass(frozen=True)
class ParameterMetadata:
    """Name, dtype and whole shape of one tensor of the stream (the fields of vLLM's ``ParamMeta``)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class MegatronWeightSource:
    """The model's weights, tensor after tensor, gathered from the ranks that hold them.

    It has the methods of ``vllm.distributed.weight_transfer.base.WeightSource`` without importing vLLM (seconds, and
    thousands of modules); ``vllm_source.MegatronWeightSource`` is the subclass of vLLM's class.

    A *group* is the embedding, one decoder layer, or final norm with output layer. Each group costs one all-gather over
    the tensor-parallel group of the stage that owns it, for a layer's experts one more over all ranks that share them,
    and, where the pipeline is gathered, one broadcast over the pipeline-parallel group. Beyond the model this takes, for
    one group at a time, its gathered shards and its whole tensors in the wire dtype. The tensors are fresh memory, never
    the live parameters.

    Args:
        chunks: this rank's ``GPTModel`` chunks, wrapped or not.
        hf_config: content of ``config.json``.
        pg_collection: Megatron's ``ProcessGroupCollection``; ``tp``, ``pp``, ``expt_tp``, ``ep``, ``tp_ep`` and ``tp_dp_cp`` are
            used.
        dtype: dtype of the stream; cast before anything is sent.
        gather_pipeline: every stage yields the whole model (dense transports, where rank 0 sends all). Otherwise a
            stage yields only the groups it owns (sharded transports).
        all_replicas: every rank gathers (CUDA IPC shares each rank's own memory). Otherwise only the first ranks of each
            stage do, as many as hold a replica of its dense part and one of its experts; iteration on the others ends at
            once.
        read: what to stream of a parameter: itself, or a tensor of its shape (its ``main_grad``).

    Collectives: construction runs one ``all_gather_object`` over ``pp`` on every rank; iteration as above; else none.

    Raises:
        InputError: the model and the naming table do not match (see ``binding.bind``).
    """

    # Called with a number of bytes where the whole tensors of the next group should lie (host memory only).
    allocate: Callable[[int], torch.Tensor] | None = None

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        hf_config: dict[str, Any],
        pg_collection: Any,
        *,
        dtype: torch.dtype,
        gather_pipeline: bool = True,
        all_replicas: bool = False,
        read: Callable[[torch.nn.Parameter], torch.Tensor] = torch.nn.Parameter.detach,
    ) -> None:
        self._read = read
        self._tp, self._tp_ep, self._pp = pg_collection.tp, pg_collection.tp_ep, pg_collection.pp
        self._place = Place.of(pg_collection)
        self._dtype = dtype
        self._gather_pipeline = gather_pipeline
        self._groups = model_groups(hf_config)
        self._bound = bind(chunks, self._groups, self._place)
        self._owners = _find_owners(self._bound, self._groups, self._pp)
        self._device = next(chunks[0].parameters()).device
        # Tensor-parallel ranks and the ranks that share experts are blocks of neighbours within a stage.
        replica = math.lcm(self._tp.size(), self._tp_ep.size())
        self.participates = all_replicas or pg_collection.tp_dp_cp.rank() < replica

    def metadata(self) -> list[ParameterMetadata]:
        """Name, dtype and shape of every tensor of the whole model, in order, on every rank. Zero collectives."""
        return [
            ParameterMetadata(name, self._dtype, shape)
            for group in self._groups
            for mapping in group
            for name, shape in mapping.huggingface
        ]

    def held_names(self) -> set[str] | None:
        """Names that this rank's pipeline stage owns; None (all) where the pipeline is gathered."""
        if self._gather_pipeline:
            return None
        return {name for index in self._yielded() for name in _names(self._groups[index])}

    def groups(self) -> list[list[str]]:
        """Names of the groups that iteration yields on this rank, in order. Zero collectives."""
        return [_names(self._groups[index]) for index in self._yielded()]

    def iter_groups(self) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
        """Yield (names, whole tensors) for each group; every participating rank has to run it to its end, in step."""
        if not self.participates:
            return
        for index in self._yielded():
            try:
                tensors = self._gather(index)
            except RuntimeError as error:
                error.add_note(f"while rank {dist.get_rank()} gathered the layer of {_names(self._groups[index])[0]!r}")
                raise
            yield _names(self._groups[index]), tensors

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for names, tensors in self.iter_groups():
            yield from zip(names, tensors, strict=True)

    def _yielded(self) -> list[int]:
        return [i for i, owner in enumerate(self._owners) if self._gather_pipeline or owner == self._pp.rank()]

    @torch.no_grad()
    def _gather(self, index: int) -> list[torch.Tensor]:
        """One group's whole tensors: views of one flat buffer in the wire dtype."""
        shapes = [shape for mapping in self._groups[index] for _, shape in mapping.huggingface]
        flat = self._empty(sum(map(_numel, shapes)))
        tensors = _views(flat, shapes)
        owner = self._owners[index]
        if owner == self._pp.rank():
            self._merge(self._groups[index], self._bound[index], tensors)
        if self._gather_pipeline and self._pp.size() > 1:
            dist.broadcast(flat, src=dist.get_global_rank(self._pp, owner), group=self._pp)
        return tensors

    def _empty(self, numel: int) -> torch.Tensor:
        if self.allocate is None or self._device.type != "cpu":
            return torch.empty(numel, dtype=self._dtype, device=self._device)
        return self.allocate(numel * self._dtype.itemsize).view(self._dtype)

    def _merge(self, group: list[Mapping], bound: list[Bound], tensors: list[torch.Tensor]) -> None:
        """Fill the group's whole tensors from the shards of all ranks that have one: one all-gather for each kind of part."""
        outputs = dict(zip(_names(group), tensors, strict=True))
        for experts, sharing, owners in ((False, self._tp, 1), (True, self._tp_ep, self._place.ep.size)):
            local = [parameter for mapping, parameter in bound if (mapping.expert is not None) == experts]
            if not local:
                continue
            shards = self._all_gather(local, sharing)
            size = len(shards) // owners
            for owner in range(owners):
                # An owner's parameters lie in the group's order, as they do in ``bound``.
                parts = [m for m in group if (m.expert is not None) == experts and self._place.owner(m) == owner]
                ranks = shards[owner * size : (owner + 1) * size]
                for mapping, *of_ranks in zip(parts, *ranks, strict=True):
                    own = [outputs[name] for name, _ in mapping.huggingface]
                    merge_into(own, of_ranks, mapping.layout, mapping.query_groups)

    def _all_gather(self, parameters: list[torch.nn.Parameter], sharing: Any) -> list[list[torch.Tensor]]:
        """For each rank of the process group its parameters in the wire dtype; shapes are equal on all. One all-gather."""
        if sharing.size() == 1:
            return [[self._read(parameter) for parameter in parameters]]
        shapes = [tuple(parameter.shape) for parameter in parameters]
        local = torch.empty(sum(map(_numel, shapes)), dtype=self._dtype, device=self._device)
        for view, parameter in zip(_views(local, shapes), parameters, strict=True):
            view.copy_(self._read(parameter))
        gathered = local.new_empty(sharing.size() * local.numel())
        dist.all_gather_into_tensor(gathered, local, group=sharing)
        return [_views(shard, shapes) for shard in gathered.chunk(sharing.size())]


def _find_owners(bound: list[list[Bound]], groups: list[list[Mapping]], pp_group: Any) -> list[int]:
    """The first pipeline stage that holds each group (a tied embedding has a copy on the last)."""
    held: list[Any] = [None] * pp_group.size()
    dist.all_gather_object(held, [bool(group) for group in bound], group=pp_group)
    owners = []
    for index, group in enumerate(groups):
        stages = [stage for stage, holds in enumerate(held) if holds[index]]
        if not stages:
            name = group[0].megatron[0]
            raise InputError(f"no pipeline stage holds {name!r}; config.json must be the one the model was built from")
        owners.append(stages[0])
    return owners


def _names(group: list[Mapping]) -> list[str]:
    return [name for mapping in group for name, _ in mapping.huggingface]


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _views(flat: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    parts = flat.split([_numel(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
