"""Megatron's shards as one stream of whole, Hugging-Face-named tensors."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_espo.collectives import control_device, gathered, on_rank_0
from megatron_espo.errors import InputError
from megatron_espo.weights.binding import Bound, Cut, Place, bind
from megatron_espo.weights.families import Mapping, model_groups
from megatron_espo.weights.layouts import Layout, unshard_into
from megatron_espo.weights.lockstep import Lockstep

_GATHER_BYTES = 64 << 20


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

    A *group* is the embedding, one decoder layer, or final norm with output layer. Its shards are gathered, as many at
    once as ``gather_bytes`` says, over the tensor-parallel group of the stage that owns it (a layer's experts over all
    ranks that share them); where the pipeline is gathered, broadcasts over the pipeline-parallel group follow. Beyond the
    model this takes one group's whole tensors in the wire dtype, two and a half times ``gather_bytes``, and whatever
    earlier tensors the caller still holds. The tensors are fresh memory, never the live parameters.

    Args:
        chunks: this rank's ``GPTModel`` chunks, wrapped or not.
        hf_config: content of ``config.json``.
        pg_collection: Megatron's ``ProcessGroupCollection``; ``tp``, ``pp``, ``expt_tp``, ``ep``, ``tp_ep`` and ``tp_dp_cp`` are
            used.
        dtype: dtype of the stream; cast before anything is sent.
        sharded: a rank yields only what its pipeline stage and its expert-parallel rank hold, and None for the other
            experts of its layers (sharded transports). Otherwise the whole model (dense ones, where rank 0 sends all).
        all_replicas: every rank gathers (CUDA IPC shares each rank's own memory). Otherwise only the first ranks of each
            stage do, as many as hold a replica of its dense part and one of its experts; iteration on the others ends at
            once.
        read: what to stream of a parameter: itself, or a tensor of its shape (its ``main_grad``).
        lockstep: finds out who is late, before each gather on a CPU and before the first one elsewhere; None: nobody does.

    Collectives: construction runs an all-reduce, a gather and a broadcast over all ranks; iteration as above; else none.

    Raises:
        InputError: the model and the naming table do not match (see ``binding.bind``).
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        hf_config: dict[str, Any],
        pg_collection: Any,
        *,
        dtype: torch.dtype,
        sharded: bool = False,
        all_replicas: bool = False,
        read: Callable[[torch.nn.Parameter], torch.Tensor] = torch.nn.Parameter.detach,
        lockstep: Lockstep | None = None,
    ) -> None:
        self._read, self._lockstep = read, lockstep
        self._tp, self._pp = pg_collection.tp, pg_collection.pp
        self._experts = pg_collection.expt_tp if sharded else pg_collection.tp_ep
        self._place = Place.of(pg_collection)
        self._dtype, self._sharded = dtype, sharded
        self._groups = model_groups(hf_config)
        self._gathered = gather_bytes(self._groups, dtype.itemsize) // dtype.itemsize
        self._bound = bind(chunks, self._groups, self._place)
        self._device = next(chunks[0].parameters()).device
        # Tensor-parallel ranks and the ranks that share experts are blocks of neighbours within a stage.
        whole = math.lcm(self._tp.size(), pg_collection.tp_ep.size())
        self.participates = all_replicas or pg_collection.tp_dp_cp.rank() < whole
        self._owners = _find_owners(self._bound, self._groups, self._pp.rank())
        answers = gathered(self.participates)
        self._others = on_rank_0(lambda: [rank for rank in range(1, len(answers)) if answers[rank]])

    def metadata(self) -> list[ParameterMetadata]:
        """Name, dtype and shape of every tensor of the whole model, in order, on every rank. Zero collectives."""
        return [
            ParameterMetadata(name, self._dtype, shape)
            for group in self._groups
            for mapping in group
            for name, shape in mapping.huggingface
        ]

    def held_names(self) -> set[str] | None:
        """Names that this rank's stage and expert-parallel rank hold; None (all) where the stream is whole."""
        if not self._sharded:
            return None
        return {name for index in self._yielded() for name in _names(self._held(index))}

    def groups(self) -> list[list[str]]:
        """Names of the groups that iteration yields on this rank, in order. Zero collectives."""
        return [_names(self._groups[index]) for index in self._yielded()]

    def iter_groups(self) -> Iterator[tuple[list[str], list[torch.Tensor | None]]]:
        """Yield (names, whole tensors) for each group; every participating rank has to run it to its end, in step."""
        if not self.participates:
            return
        for index in self._yielded():
            names = _names(self._groups[index])
            try:
                yield names, self._gather(index)
            except RuntimeError as error:
                error.add_note(f"while rank {dist.get_rank()} gathered the layer of {names[0]!r}")
                raise

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        for names, tensors in self.iter_groups():
            yield from zip(names, tensors, strict=True)
            del tensors  # or it would live until the next group is gathered

    def _yielded(self) -> list[int]:
        return [i for i, owner in enumerate(self._owners) if not self._sharded or owner == self._pp.rank()]

    def _held(self, index: int) -> list[Mapping]:
        """What of a group this rank yields."""
        return [m for m in self._groups[index] if not self._sharded or self._place.holds(m)]

    @torch.no_grad()
    def _gather(self, index: int) -> list[torch.Tensor | None]:
        """One group's whole tensors in the wire dtype; None for those that another rank yields."""
        group, held = self._groups[index], self._held(index)
        outputs = {
            name: torch.empty(shape, dtype=self._dtype, device=self._device)
            for mapping in held
            for name, shape in mapping.huggingface
        }
        every = self._device.type == "cpu" and not self._sharded
        if self._lockstep is not None and (every or index == self._yielded()[0]):
            self._lockstep.meet(f"the weights of {_names(group)[0]}", self._others)
        if self._owners[index] == self._pp.rank():
            self._merge(index, outputs)
        if not self._sharded and self._pp.size() > 1:
            self._broadcast(list(outputs.values()), dist.get_global_rank(self._pp, self._owners[index]))
        return [outputs.get(name) for name in _names(group)]

    def _merge(self, index: int, outputs: dict[str, torch.Tensor]) -> None:
        """Fill the group's whole tensors from the shards of all ranks that have one."""
        group, cut_up = self._groups[index], {False: [], True: []}
        for bound in self._bound[index]:
            is_expert = bound.mapping.expert is not None
            if (self._experts if is_expert else self._tp).size() == 1 or bound.mapping.layout is Layout.REPLICATED:
                _put(outputs, bound.mapping, self._read(bound.parameter), self._place.cut(bound.mapping))
            else:
                cut_up[is_expert].append(bound)
        for is_expert, sharing in ((False, self._tp), (True, self._experts)):
            own = cut_up[is_expert]
            parts = [[mapping for mapping, _ in own]]
            if is_expert and not self._sharded:
                # An owner's parameters lie in the group's order, as they do in ``own``.
                owners = range(self._place.ep.size)
                parts = [[m for m in group if m.expert is not None and self._place.owner(m) == o] for o in owners]
            tp_size = sharing.size() // len(parts)
            parameters = [self._read(parameter) for _, parameter in own]
            for batch in batches([p.shape for p in parameters], self._gathered // sharing.size()):
                blocks = [parameters[position][rows] for position, rows in batch]
                for rank, of_rank in enumerate(self._all_gather(blocks, sharing)):
                    owner, cut = divmod(rank, tp_size)
                    for (position, rows), block in zip(batch, of_rank, strict=True):
                        mapping, size = parts[owner][position], len(parameters[position])
                        _put(outputs, mapping, block, Cut(cut, tp_size), first_row=rows.start, local_rows=size)

    def _all_gather(self, blocks: list[torch.Tensor], sharing: Any) -> list[list[torch.Tensor]]:
        """For each rank of the process group its blocks in the wire dtype; shapes are equal on all. One all-gather."""
        shapes = [tuple(block.shape) for block in blocks]
        local = torch.empty(sum(map(_numel, shapes)), dtype=self._dtype, device=self._device)
        for view, block in zip(_views(local, shapes), blocks, strict=True):
            view.copy_(block)
        gathered = local.new_empty(sharing.size() * local.numel())
        dist.all_gather_into_tensor(gathered, local, group=sharing)
        return [_views(shard, shapes) for shard in gathered.chunk(sharing.size())]

    def _broadcast(self, tensors: list[torch.Tensor], source: int) -> None:
        """Whole tensors from one pipeline stage to the others; small ones travel together."""
        for batch in batches([tensor.shape for tensor in tensors], self._gathered):
            blocks = [tensors[position][rows] for position, rows in batch]
            flat = blocks[0] if len(blocks) == 1 else torch.cat([block.view(-1) for block in blocks])
            dist.broadcast(flat, src=source, group=self._pp)
            if len(blocks) > 1:
                for block, view in zip(blocks, _views(flat, [block.shape for block in blocks]), strict=True):
                    block.copy_(view)


def gather_bytes(groups: Sequence[Sequence[Mapping]], itemsize: int) -> int:
    """Most bytes that one collective of ``MegatronWeightSource`` brings together (unless a single row is more)."""
    largest = max(sum(_numel(shape) for m in group for _, shape in m.huggingface) for group in groups)
    return min(_GATHER_BYTES, largest * itemsize // 16)


def batches(shapes: Sequence[Sequence[int]], limit: int) -> Iterator[list[tuple[int, slice]]]:
    """All rows of tensors of these shapes in order, as (tensor's position, rows): at most ``limit`` elements at once, or
    a single row."""
    batch: list[tuple[int, slice]] = []
    room = limit
    for position, (rows, *row) in enumerate(shapes):
        size, start = _numel(row), 0
        while start < rows:
            if batch and room < size:
                yield batch
                batch, room = [], limit
            stop = min(rows, start + max(1, room // size))
            batch.append((position, slice(start, stop)))
            room -= (stop - start) * size
            start = stop
    if batch:
        yield batch


def _put(outputs: dict[str, torch.Tensor], mapping: Mapping, part: torch.Tensor, cut: Cut, **rows: int) -> None:
    """Write a rank's shard of a parameter into the tensors it is made of (see ``unshard_into``)."""
    own = [outputs[name] for name, _ in mapping.huggingface]
    unshard_into(own, part, mapping.layout, cut.rank, cut.size, mapping.query_groups, **rows)


def _find_owners(bound: list[list[Bound]], groups: list[list[Mapping]], stage: int) -> list[int]:
    """The first pipeline stage that holds each group (a tied embedding has a copy on the last)."""
    nobody = dist.get_world_size()
    owners = torch.tensor([stage if group else nobody for group in bound], device=control_device())
    dist.all_reduce(owners, op=dist.ReduceOp.MIN)
    for group, owner in zip(groups, owners.tolist(), strict=True):
        if owner == nobody:
            name = group[0].megatron[0]
            raise InputError(f"no pipeline stage holds {name!r}; config.json must be the one the model was built from")
    return owners.tolist()


def _names(group: list[Mapping]) -> list[str]:
    return [name for mapping in group for name, _ in mapping.huggingface]


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _views(flat: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    parts = flat.split([_numel(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
