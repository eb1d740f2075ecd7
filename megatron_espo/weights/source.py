"""Gather Megatron's shards into a stream of whole tensors with Hugging Face names."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from socket import gethostname
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_espo.distributed.monitored_barrier import MonitoredBarrier
from megatron_espo.errors import InputError
from megatron_espo.models.layouts import ShardLayout, local_shape, unshard_into
from megatron_espo.models.mapping import ParamMapping
from megatron_espo.models.spec import ModelSpec
from megatron_espo.weights.binding import ShardIndex, ShardRanks, bind, unwrap
from megatron_espo.weights.exchange import Exchange, Routes, Rows, Shards

_GATHER_BYTES = 64 << 20


@dataclass(frozen=True)
class ParameterMetadata:
    """Name, dtype and whole shape of a tensor of the stream, as vLLM's ``ParamMeta``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class TensorStream:
    """A source of groups of tensors that also yields single tensors."""

    def iter_groups(self) -> Iterator[tuple[list[str], list[Any]]]:
        """Yield (names, tensors) for each group."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for names, tensors in self.iter_groups():
            yield from zip(names, tensors, strict=True)
            del tensors  # free them before the next group is gathered


class WeightGatherer(TensorStream):
    """The model's weights, one tensor after the other, gathered from the ranks that hold them.

    It has the methods of ``vllm.distributed.weight_transfer.base.WeightSource`` without importing
    vLLM, which takes seconds; ``vllm_source.MegatronWeightSource`` is the subclass of vLLM's class.

    A *group* is the embedding, one decoder layer, or the final norm with the output layer. Its
    shards are gathered, at most ``gather_bytes`` in one collective, over the tensor-parallel group
    of the stage that holds it (a layer's experts over all ranks that share them). If the pipeline
    is gathered, the shards are first sent to the other stages (see ``exchange.Routes``), while the
    previous shards are gathered. Beyond the model this takes the whole tensors of one group in the
    stream's dtype, 3 times ``gather_bytes``, and the earlier tensors that the caller still holds.
    The tensors are new memory, never the live parameters. Ranks with the same host name are a node.

    Args:
        chunks: this rank's ``GPTModel`` chunks, wrapped or not.
        spec: the model.
        pg_collection: Megatron's ``ProcessGroupCollection``; ``tp``, ``pp``, ``expt_tp``, ``ep``,
            ``tp_ep`` and ``tp_dp_cp`` are used.
        dtype: dtype of the stream; tensors are cast before they are sent. A tensor that
            ``is_float32`` stays so.
        sharded: a rank yields only what its pipeline stage and its expert-parallel rank hold, and
            None for the other experts of its layers (sharded transports). Otherwise it yields the
            whole model (dense transports, in which rank 0 sends everything).
        all_replicas: every rank gathers (CUDA IPC shares each rank's own memory). Otherwise only
            the first ranks of each stage do, which together hold one replica of its dense
            parameters and of its experts; the other ranks yield nothing.
        read: returns the tensor to stream for a parameter: itself, or one of its shape such as its
            ``main_grad``.
        barrier: of all ranks; names a late rank before each gather on a CPU, and before the first
            one elsewhere.

    Collectives: the constructor runs an all-gather of objects over all ranks, and may make process
    groups; iteration as above.

    Raises:
        InputError: the model does not match the naming table (see ``binding.bind``).
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        spec: ModelSpec,
        pg_collection: Any,
        *,
        dtype: torch.dtype,
        sharded: bool = False,
        all_replicas: bool = False,
        read: Callable[[torch.nn.Parameter], torch.Tensor] = torch.nn.Parameter.detach,
        barrier: MonitoredBarrier | None = None,
    ) -> None:
        self._read, self._barrier = read, barrier
        self._tp, self._pp = pg_collection.tp, pg_collection.pp
        self._experts = pg_collection.expt_tp if sharded else pg_collection.tp_ep
        self._ranks = ShardRanks.of(pg_collection)
        self._dtype, self._sharded = dtype, sharded
        self._groups = spec.groups
        self._limit = gather_bytes(self._groups, dtype.itemsize) // dtype.itemsize
        self._parameters = bind(chunks, self._groups, self._ranks)
        self._device = next(chunks[0].parameters()).device
        self._padded_vocab = unwrap(chunks[0]).vocab_size
        # In a stage, tensor-parallel ranks and ranks that share experts are contiguous blocks.
        replica = math.lcm(self._tp.size(), pg_collection.tp_ep.size())
        self.participates = all_replicas or pg_collection.tp_dp_cp.rank() < replica
        self._spreads = not sharded and self._pp.size() > 1
        shared = (self._tp, self._experts)
        held = [i for i, own in enumerate(self._groups) if self._parameters.keys() & set(own)]
        place = _Place(_node(self._pp, shared), self._pp.rank(), held)
        everyone: list[_Place | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, place if self.participates else None)
        places = {rank: place for rank, place in enumerate(everyone) if place is not None}
        self._owners = owners = _find_owners(places.values(), self._groups)
        # Indices of the groups that this rank yields.
        self._yielded = [i for i, o in enumerate(owners) if not sharded or o == self._pp.rank()]
        ranks, nodes = list(places), [place.node for place in places.values()]
        stage = len(ranks) // (self._pp.size() if self._spreads else 1)
        routes = Routes.of(nodes if all(nodes) else [""] * len(nodes), stage)
        like = torch.empty(0, dtype=dtype, device=self._device)
        self._exchange = Exchange(routes, ranks, self._pp if self._spreads else None, shared, like)

    def metadata(self) -> list[ParameterMetadata]:
        """Return name, dtype and shape of every tensor of the whole model, in stream order."""
        return [item for group in self._groups for item in self._describe(group)]

    def _describe(self, mappings: list[ParamMapping]) -> list[ParameterMetadata]:
        return [
            ParameterMetadata(name, self._dtype_of(mapping), shape)
            for mapping in mappings
            for name, shape in mapping.huggingface
        ]

    def held_names(self) -> set[str] | None:
        """Return the names that this rank yields with ``sharded``; None means all names."""
        if not self._sharded:
            return None
        return {name for index in self._yielded for name in _names(self._held(index))}

    def groups(self) -> list[list[str]]:
        """Return the names of each group that iteration yields on this rank, in order."""
        return [_names(self._groups[index]) for index in self._yielded]

    def iter_groups(self) -> Iterator[tuple[list[str], list[torch.Tensor | None]]]:
        """Yield (names, whole tensors) for each group. Collective over participating ranks, with a
        barrier over all ranks.
        """
        every = self._device.type == "cpu" and not self._sharded
        for position, index in enumerate(self._yielded):
            names = _names(self._groups[index])
            if self._barrier is not None and (every or position == 0):
                self._barrier.wait(f"the weights of {names[0]}")
            if not self.participates:
                continue
            try:
                yield names, self._gather(index)
            except RuntimeError as error:
                error.add_note(f"while rank {dist.get_rank()} gathered the layer of {names[0]!r}")
                raise

    def _held(self, index: int) -> list[ParamMapping]:
        """Return the part of a group that this rank yields."""
        return [m for m in self._groups[index] if not self._sharded or self._ranks.holds(m)]

    @torch.no_grad()
    def _gather(self, index: int) -> list[torch.Tensor | None]:
        """Return a group's whole tensors; None for those that another rank yields."""
        group, owner = self._groups[index], self._owners[index]
        outputs = {
            item.name: torch.empty(item.shape, dtype=item.dtype, device=self._device)
            for item in self._describe(self._held(index))
        }
        if self._spreads or owner == self._pp.rank():
            # A float32 tensor travels as two bfloat16 columns for each of its elements.
            self._merge(index, {name: out.view(self._dtype) for name, out in outputs.items()})
        return [outputs.get(name) for name in _names(group)]

    def _merge(self, index: int, outputs: dict[str, torch.Tensor]) -> None:
        """Fill the group's whole tensors from the shards of all ranks that have one."""
        jobs: list[tuple[Shards, Rows]] = []
        for shards in self._shards(index):
            if shards.size == 1 and not self._spreads:
                for mapping, tensor in zip(shards.mappings[0], shards.tensors or (), strict=True):
                    _put(outputs, mapping, tensor, ShardIndex())
            else:
                limit = self._limit // shards.size
                jobs.extend((shards, rows) for rows in batches(shards.shapes, limit))
        start, owner, ahead = self._exchange.start, self._owners[index], None
        for i, (shards, rows) in enumerate(jobs):
            finish = ahead or start(shards, rows, owner)
            # The other stages get the next batch while this one is gathered.
            ahead = start(*jobs[i + 1], owner) if i + 1 < len(jobs) else None
            tp_size = shards.size // len(shards.mappings)
            for rank, blocks in enumerate(finish()):
                owning, shard = divmod(rank, tp_size)
                for (position, part), block in zip(rows, blocks, strict=True):
                    mapping, total = shards.mappings[owning][position], shards.shapes[position][0]
                    _put(outputs, mapping, block, ShardIndex(shard, tp_size), part.start, total)

    def _shards(self, index: int) -> Iterator[Shards]:
        """Yield the parameters that ranks of the owning stage have whole, and those in shards."""
        shared: dict[Any, list[ParamMapping]] = defaultdict(list)
        for mapping in self._groups[index]:
            shared[self._sharing(mapping)].append(mapping)
        is_owner = self._owners[index] == self._pp.rank()
        for group, chosen in shared.items():
            own = [m for m in chosen if self._ranks.holds(m)]
            mappings = [own]
            if group is self._experts and not self._sharded:
                owners = range(self._ranks.ep.size)
                mappings = [[m for m in chosen if self._ranks.owner(m) == o] for o in owners]
            shapes = [self._shape(mapping) for mapping in own]
            tensors = [self._local(mapping) for mapping in own] if is_owner else None
            yield Shards(group, group.size() if group else 1, mappings, shapes, tensors)

    def _sharing(self, mapping: ParamMapping) -> Any:
        """Return the group whose ranks have one shard each; None if each rank has the whole."""
        group = self._tp if mapping.expert is None else self._experts
        return None if group.size() == 1 or mapping.layout is ShardLayout.REPLICATED else group

    def _shape(self, mapping: ParamMapping) -> tuple[int, ...]:
        size = self._ranks.shard(mapping).size
        shapes = [shape for _, shape in mapping.huggingface]
        shape = local_shape(mapping.layout, shapes, size, self._padded_vocab)
        ratio = self._dtype_of(mapping).itemsize // self._dtype.itemsize
        return (*shape[:-1], shape[-1] * ratio)

    def _dtype_of(self, mapping: ParamMapping) -> torch.dtype:
        return torch.float32 if mapping.is_float32 else self._dtype

    def _local(self, mapping: ParamMapping) -> torch.Tensor:
        """Return this rank's shard, a float32 one as elements of the stream's dtype."""
        shard = self._read(self._parameters[mapping])
        return shard.view(self._dtype) if mapping.is_float32 else shard


class _Place(NamedTuple):
    """A rank's node, its pipeline stage, and the indices of the groups in it."""

    node: str
    stage: int
    held: list[int]


def _node(pp: Any, shared: Sequence[Any]) -> str:
    """Return the host name; "" if ranks are not in Megatron's default order, to ignore nodes."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    stage = ranks // pp.size()
    is_usual = dist.get_process_group_ranks(pp) == list(range(rank % stage, ranks, stage))
    for group in shared:
        first = rank // group.size() * group.size()
        block = list(range(first, first + group.size()))
        is_usual &= dist.get_process_group_ranks(group) == block
    return gethostname() if is_usual else ""


def gather_bytes(groups: Sequence[Sequence[ParamMapping]], itemsize: int) -> int:
    """Return the most bytes that one collective gathers (unless a single row is larger)."""
    sizes = [sum(math.prod(shape) for m in group for _, shape in m.huggingface) for group in groups]
    return min(_GATHER_BYTES, max(sizes) * itemsize // 16)


def batches(shapes: Sequence[Sequence[int]], limit: int) -> Iterator[Rows]:
    """Split tensors of these shapes into batches of rows, as (position of the tensor, rows).

    A batch has at most ``limit`` elements, or a single row.
    """
    batch: Rows = []
    room = limit
    for position, (rows, *row) in enumerate(shapes):
        size, start = math.prod(row), 0
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


def _put(
    outputs: dict[str, torch.Tensor],
    mapping: ParamMapping,
    part: torch.Tensor,
    shard: ShardIndex,
    first_row: int = 0,
    rows: int | None = None,
) -> None:
    """Write (rows of) a rank's shard of a parameter into its Hugging Face tensors."""
    own, heads = [outputs[name] for name, _ in mapping.huggingface], mapping.query_groups
    unshard_into(own, part, mapping.layout, *shard, heads, first_row=first_row, local_rows=rows)


def _find_owners(places: Iterable[_Place], groups: list[list[ParamMapping]]) -> list[int]:
    """Return the first pipeline stage that holds each group (the last has a tied copy)."""
    owners = []
    for index, group in enumerate(groups):
        stages = [place.stage for place in places if index in place.held]
        if not stages:
            raise InputError(
                f"no pipeline stage holds {group[0].megatron[0]!r}; build the model from the same "
                "config.json"
            )
        owners.append(min(stages))
    return owners


def _names(group: list[ParamMapping]) -> list[str]:
    return [name for mapping in group for name, _ in mapping.huggingface]
