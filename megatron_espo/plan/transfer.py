"""Which rank contributes which bytes of which Hugging Face tensor on the way into the engine, and how long that takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from megatron_espo.mcore.meta import BuiltRank, Held
from megatron_espo.weights.families import Mapping
from megatron_espo.weights.layouts import Layout, plan_pieces
from megatron_espo.weights.source import batches, gather_bytes

Groups = Sequence[Sequence[Mapping]]


@dataclass(frozen=True)
class Contribution:
    """Indices ``start:stop`` of a tensor's cut dimension, from one global rank."""

    rank: int
    start: int
    stop: int
    bytes: int


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the stream: whole shape and bytes in the engine's dtype, the dimension that is cut, and its sources."""

    name: str
    shape: tuple[int, ...]
    bytes: int
    stage: int
    dim: int
    contributions: tuple[Contribution, ...]


@dataclass(frozen=True)
class GroupPlan:
    """The embedding, one decoder layer, or the head: what is gathered and sent at once.

    Attributes:
        gathered_bytes: whole tensors.
        shard_bytes: most that a rank contributes, of its dense part or of its experts.
        gather_ranks: ranks that it is shared with.
        peak_bytes: extra memory on a rank of the owning stage meanwhile: the whole tensors, those before that are still
            held (one tensor; with ``shared_memory`` and ``tcp`` the group), and the buffers of the largest collective.
    """

    name: str
    stage: int
    tensors: int
    gathered_bytes: int
    shard_bytes: int
    gather_ranks: int
    peak_bytes: int


class Gather(NamedTuple):
    """Bytes from each rank, the ranks, and the shapes of each rank's shards."""

    bytes: int
    members: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Links:
    """Speeds in bytes a second and direction: between GPUs of a node, and between nodes of ``gpus_per_node``."""

    gpu: float
    network: float
    gpus_per_node: int

    def between(self, ranks: Sequence[int]) -> float:
        """The slowest link that a collective over ``ranks`` crosses."""
        return self.gpu if len({rank // self.gpus_per_node for rank in ranks}) == 1 else self.network


@dataclass(frozen=True)
class Transfer:
    """The whole push of one version.

    Attributes:
        sender: who hands the tensors to the engine.
        gather_s, pipeline_s, engine_s: estimated seconds, one after the other.
        peak_bytes: largest extra memory of a rank.
    """

    transport: str
    sender: str
    bytes: int
    gather_s: float
    pipeline_s: float
    engine_s: float
    peak_bytes: int
    groups: tuple[GroupPlan, ...]
    tensors: tuple[TensorPlan, ...]

    @property
    def seconds(self) -> float:
        """Estimated seconds of one push."""
        return self.gather_s + self.pipeline_s + self.engine_s


def plan_transfer(
    ranks: Sequence[BuiltRank], groups: Groups, itemsize: int, transport: str, stage_ranks: int, links: Links, copies_to_nodes: int = 0
) -> Transfer:
    """Follow ``MegatronWeightSource`` group by group.

    Args:
        ranks: of ``build_ranks``.
        groups: of ``families.model_groups``.
        itemsize: bytes of an element on the wire.
        transport: ``ipc``, ``nccl``, ``shared_memory`` or ``tcp``.
        stage_ranks: ranks of a pipeline stage.
        copies_to_nodes: how often an engine's owner sends everything to the engine's node; 0: the owner is on that node too.

    Raises:
        RuntimeError: a tensor that is not covered exactly once.
    """
    sources = _sources(ranks)
    stages = max(rank.stage for rank in ranks) + 1
    tensors: list[TensorPlan] = []
    plans: list[GroupPlan] = []
    gather_s = pipeline_s = 0.0
    previous = 0
    room = gather_bytes(groups, itemsize) // itemsize
    for index, mappings in enumerate(groups):
        holders = [sources[mapping.huggingface[0][0]] for mapping in mappings]
        stage = min(stage for stage, _ in holders[0])
        shards = [[held for at, held in found if at == stage] for found in holders]
        own = [_tensor_plans(mapping, held[0], stage, itemsize) for mapping, held in zip(mappings, shards, strict=True)]
        found = [tensor for plans in own for tensor in plans]
        size = sum(tensor.bytes for tensor in found)
        gathers = _gathers([held for copies in shards for held in copies[:1]], itemsize)
        buffers = [_buffer_bytes(gather, room, itemsize) for gather in gathers]
        if stages > 1:
            buffers.append(_buffer_elements([tensor.shape for tensor in found], room) * itemsize)
        shard_bytes, members, _ = max(gathers, key=lambda gather: gather.bytes * len(gather.members), default=Gather(0, (0,), ()))
        # Ranks write into a block that holds two neighbours. Elsewhere vLLM still has the tensor before in its hands, and
        # shards are gathered into buffers.
        in_block = transport in ("shared_memory", "tcp")
        peak_bytes = previous + size + (0 if in_block else max(buffers, default=0))
        previous = size if in_block else found[-1].bytes
        group = GroupPlan(_group_name(index, mappings), stage, len(found), size, shard_bytes, len(members), peak_bytes)
        gather_s += sum(shard * (len(among) - 1) / links.between(among) for shard, among, _ in gathers)
        if stages > 1:
            pipeline_s += size / links.between(range(0, stages * stage_ranks, stage_ranks))
        plans.append(group)
        tensors += found
    check_coverage(tensors, groups)
    total = sum(tensor.bytes for tensor in tensors)
    # With ipc each worker of the engine reads from the memory of its own GPU; nothing crosses a link.
    engine_s = 0.0 if transport == "ipc" else total / links.gpu
    if copies_to_nodes:
        engine_s = copies_to_nodes * total / links.network
    sender = "the trainer's rank on the same GPU" if transport == "ipc" else "rank 0"
    peak = max(group.peak_bytes for group in plans)
    return Transfer(
        transport, sender, total, gather_s, pipeline_s, engine_s, peak, tuple(plans), tuple(tensors)
    )


def check_coverage(tensors: Sequence[TensorPlan], groups: Groups) -> None:
    """RuntimeError unless the plan has every tensor of the model once, and every index of each from exactly one rank."""
    expected = [name for group in groups for mapping in group for name, _ in mapping.huggingface]
    if sorted(expected) != sorted(tensor.name for tensor in tensors):
        raise RuntimeError("plan: the transfer's tensors are not those of the model")
    for tensor in tensors:
        position = 0
        for piece in sorted(tensor.contributions, key=lambda piece: piece.start):
            if piece.start != position:
                what = "missing" if piece.start > position else "sent twice"
                raise RuntimeError(f"plan: {tensor.name}: {what} around index {position} of dimension {tensor.dim}")
            position = piece.stop
        if position != tensor.shape[tensor.dim] or sum(piece.bytes for piece in tensor.contributions) != tensor.bytes:
            raise RuntimeError(f"plan: {tensor.name}: covered up to index {position} of {tensor.shape[tensor.dim]}")


def _sources(ranks: Sequence[BuiltRank]) -> dict[str, list[tuple[int, Held]]]:
    """First Hugging Face name of each parameter -> the stages that hold it, with how."""
    found: dict[str, list[tuple[int, Held]]] = {}
    for rank in ranks:
        for held in rank.held:
            found.setdefault(held.mapping.huggingface[0][0], []).append((rank.stage, held))
    return found


def _tensor_plans(mapping: Mapping, held: Held, stage: int, itemsize: int) -> list[TensorPlan]:
    """The tensors that one parameter is made of."""
    dim = mapping.layout.dim
    extents = [shape[dim] for _, shape in mapping.huggingface]
    contributions: list[list[Contribution]] = [[] for _ in extents]
    for piece in plan_pieces(mapping.layout, extents, len(held.sharing), mapping.query_groups, held.shape[dim]):
        row = prod(mapping.huggingface[piece.source][1]) // extents[piece.source] * itemsize
        stop = piece.start + piece.length
        contributions[piece.source].append(
            Contribution(held.sharing[piece.rank], piece.start, stop, piece.length * row)
        )
    return [
        TensorPlan(name, shape, prod(shape) * itemsize, stage, dim, tuple(parts))
        for (name, shape), parts in zip(mapping.huggingface, contributions, strict=True)
    ]


def _gathers(held: Sequence[Held], itemsize: int) -> list[Gather]:
    """What is gathered of a group: the dense part's shards and the experts."""
    gathers = []
    for is_expert in (False, True):
        part = [item for item in held if item.is_expert == is_expert and item.mapping.layout is not Layout.REPLICATED]
        if part:
            members = tuple(sorted({rank for item in part for rank in item.sharing}))
            shapes = tuple(item.shape for item in part if item.sharing == part[0].sharing)
            gathers.append(Gather(sum(map(prod, shapes)) * itemsize, members, shapes))
    return gathers


def _buffer_bytes(gather: Gather, room: int, itemsize: int) -> int:
    """One rank's shards and all ranks', of the largest collective."""
    ranks = len(gather.members)
    return _buffer_elements(gather.shapes, room // ranks) * (ranks + 1) * itemsize if ranks > 1 else 0


def _buffer_elements(shapes: Sequence[Sequence[int]], limit: int) -> int:
    rows = [prod(shape[1:]) for shape in shapes]
    return max(sum((part.stop - part.start) * rows[i] for i, part in batch) for batch in batches(shapes, limit))


def _group_name(index: int, mappings: Sequence[Mapping]) -> str:
    """Where in the checkpoint the group's tensors are."""
    if index == 0:
        return "embedding"
    name = mappings[0].huggingface[0][0].split(".")
    return ".".join(name[:3]) if name[1] == "layers" else "head"
