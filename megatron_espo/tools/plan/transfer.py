"""The weight update: gathers, their ranks and memory, and the estimated time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from megatron_espo.megatron.meta import BuiltRank, ParamShard
from megatron_espo.models.layouts import ShardLayout
from megatron_espo.models.mapping import ParamMapping
from megatron_espo.weights.exchange import Routes
from megatron_espo.weights.source import batches, gather_bytes


@dataclass(frozen=True)
class GroupPlan:
    """Tensors that are gathered and sent together: the embedding, one decoder layer, or the head.

    Attributes:
        gathered_bytes: bytes of the whole tensors.
        peak_bytes: extra memory on a rank of the owning stage: the whole tensors, the last tensor
            of the previous group (vLLM's own transports still hold it), and the buffers of the
            largest collective.
    """

    name: str
    stage: int
    tensors: int
    gathered_bytes: int
    peak_bytes: int


class Shards(NamedTuple):
    """The shapes of a rank's parameters of which ``size`` ranks have one shard each."""

    size: int
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Links:
    """Bytes a second and direction inside a node of ``gpus_per_node``, and between nodes."""

    gpu: float
    network: float
    gpus_per_node: int

    def between(self, ranks: Sequence[int]) -> float:
        """The slowest link that a collective over ``ranks`` crosses."""
        nodes = {rank // self.gpus_per_node for rank in ranks}
        return self.gpu if len(nodes) == 1 else self.network


@dataclass(frozen=True)
class Transfer:
    """One weight update.

    Attributes:
        sender: which rank hands the tensors to the engine.
        gather_s, pipeline_s, engine_s: estimated seconds inside stages or nodes, between them, and
            into the engine.
        overlap_s: seconds in which ``pipeline_s`` and ``gather_s`` overlap.
        received: for each stage the bytes that a GPU (its first) receives over the network, and
            inside its node.
        peak_bytes: largest extra memory of a rank, on the model's device.
        file_bytes: host memory (with ``rollout.hosts``: disk space) of the two files of ``files``.
    """

    transport: str
    sender: str
    bytes: int
    gather_s: float
    pipeline_s: float
    engine_s: float
    overlap_s: float
    received: list[list[int]]
    peak_bytes: int
    file_bytes: int
    groups: tuple[GroupPlan, ...]

    @property
    def seconds(self) -> float:
        """Estimated seconds of one update."""
        return self.gather_s + self.pipeline_s + self.engine_s - self.overlap_s


def plan_transfer(
    ranks: Sequence[BuiltRank],
    groups: Sequence[Sequence[ParamMapping]],
    itemsize: int,
    transport: str,
    stage_ranks: int,
    sources: int,
    links: Links,
    copies_to_nodes: int = 0,
) -> Transfer:
    """Follow ``WeightGatherer`` group by group.

    Args:
        ranks: from ``build_ranks``.
        groups: from ``ModelSpec.groups``.
        itemsize: bytes of an element that the engine receives.
        transport: ``files``, ``ipc`` or ``nccl``.
        stage_ranks: ranks of a pipeline stage.
        sources: how many of them gather (see ``WeightGatherer.participates``).
        copies_to_nodes: how often an engine's owner sends all bytes to another node, where the
            engine is; 0: the engine is on the owner's node.
    """
    # First Hugging Face name of each parameter -> its shards, with their stages.
    shards: dict[str, list[tuple[int, ParamShard]]] = {}
    for rank in ranks:
        for held in rank.held:
            shards.setdefault(held.mapping.huggingface[0][0], []).append((rank.stage, held))
    stages = max(rank.stage for rank in ranks) + 1
    takes_part = [at * stage_ranks + i for at in range(stages) for i in range(sources)]
    routes = Routes.of([rank // links.gpus_per_node for rank in takes_part], sources)
    traffic = Traffic(routes, links, takes_part, itemsize)
    plans: list[GroupPlan] = []
    last_tensor = 0
    room = gather_bytes(groups, itemsize) // itemsize
    for index, mappings in enumerate(groups):
        holders = [shards[mapping.huggingface[0][0]] for mapping in mappings]
        stage = min(stage for stage, _ in holders[0])
        owned = [next(held for at, held in found if at == stage) for found in holders]
        shapes = [shape for mapping in mappings for _, shape in mapping.huggingface]
        size = sum(map(prod, shapes)) * itemsize
        gathers = [part for part in _shards(owned) if part.size > 1 or stages > 1]
        buffers = traffic.add(gathers, stage, room)
        plans.append(
            GroupPlan(
                name=_group_name(index, mappings),
                stage=stage,
                tensors=len(shapes),
                gathered_bytes=size,
                peak_bytes=last_tensor + size + buffers,
            )
        )
        last_tensor = 0 if transport == "files" else prod(shapes[-1]) * itemsize
    sizes = [group.gathered_bytes for group in plans]
    total, is_ipc = sum(sizes), transport == "ipc"
    # With ipc each worker of the engine reads the memory of its own GPU; nothing crosses a link.
    engine_s = 0.0 if is_ipc else total / links.gpu
    if copies_to_nodes:
        engine_s = copies_to_nodes * total / links.network
    return Transfer(
        transport=transport,
        sender="the trainer's rank on the same GPU" if is_ipc else "rank 0",
        bytes=total,
        gather_s=traffic.gather_s,
        pipeline_s=traffic.send_s,
        engine_s=engine_s,
        overlap_s=traffic.gather_s + traffic.send_s - traffic.seconds,
        received=traffic.received,
        peak_bytes=max(group.peak_bytes for group in plans),
        # The groups use two files alternately.
        file_bytes=max(sizes[::2]) + max(sizes[1::2]) if transport == "files" else 0,
        groups=tuple(plans),
    )


class Traffic:
    """Adds up time and received bytes of ``Exchange``.

    Args:
        ranks: the global ranks that take part.
        itemsize: bytes of an element.

    Attributes:
        send_s, gather_s, seconds: between stages, inside them or their nodes, and of both together.
        received: for each stage the bytes that its first rank receives: over the network, inside
            its node.
    """

    def __init__(self, routes: Routes, links: Links, ranks: Sequence[int], itemsize: int) -> None:
        self._routes, self._links, self._ranks, self._itemsize = routes, links, ranks, itemsize
        self.send_s = self.gather_s = self.seconds = 0.0
        self.received = [[0, 0] for _ in range(0, routes.ranks, routes.stage)]

    def add(self, gathers: Sequence[Shards], owner: int, room: int) -> int:
        """Add one group of stage ``owner``; return the bytes of its largest buffers."""
        routes, first = self._routes, owner * self._routes.stage
        sent, gathered, wholes, buffers = [], [], [0], [0]
        for size, shapes in gathers:
            parts, members = routes.parts(size), routes.gather(first, size)
            for batch in batches(shapes, room // size):
                elements = sum((rows.stop - rows.start) * prod(shapes[i][1:]) for i, rows in batch)
                each = -(-elements // parts) * self._itemsize
                near = self._seconds(each * parts, routes.pipeline(first))
                sent.append(near + self._seconds(each, routes.rail(first)))
                gathered.append(self._seconds(each, members) * (len(members) - 1))
                wholes.append(each * parts)
                buffers.append(each * len(members) if len(members) > 1 else 0)
                for stage, received in enumerate(self.received):
                    rank = stage * routes.stage
                    for sender, size_sent in self._senders(rank, owner, size, each):
                        received[self._node(sender) == self._node(rank)] += size_sent
        self.send_s += sum(sent)
        self.gather_s += sum(gathered)
        # A batch is gathered while the next one is sent.
        self.seconds += sum(map(max, [0.0, *gathered], [*sent, 0.0]))
        return 2 * max(wholes) + max(buffers)

    def _seconds(self, size: int, members: range) -> float:
        ranks = [self._ranks[member] for member in members]
        return size / self._links.between(ranks) if len(ranks) > 1 else 0.0

    def _senders(self, rank: int, owner: int, size: int, each: int) -> Iterator[tuple[int, int]]:
        """Yield (sender, bytes) of what ``rank`` receives of one batch."""
        routes = self._routes
        if not routes.is_source(rank, owner):
            yield routes.rail(rank)[routes.source(owner)], each
        elif (sender := routes.sender(rank, owner)) != rank:
            yield sender, each * routes.parts(size)
        yield from ((other, each) for other in routes.gather(rank, size) if other != rank)

    def _node(self, rank: int) -> int:
        return self._ranks[rank] // self._links.gpus_per_node


def _shards(held: Sequence[ParamShard]) -> list[Shards]:
    """A group's parameters: those that each rank has whole, dense shards, experts."""
    whole: list[tuple[int, ...]] = []
    found = []
    for is_expert in (False, True):
        kind = [shard for shard in held if (shard.mapping.expert is not None) == is_expert]
        size = len({rank for shard in kind for rank in shard.sharing})
        split = []
        for shard in kind:
            if size == 1 or shard.mapping.layout is ShardLayout.REPLICATED:
                whole.append(shard.shape)
            else:
                split.append(shard)
        # Of the experts only those of the first rank.
        if shapes := tuple(shard.shape for shard in split if shard.sharing == split[0].sharing):
            found.append(Shards(size, shapes))
    return [Shards(1, tuple(whole)), *found] if whole else found


def _group_name(index: int, mappings: Sequence[ParamMapping]) -> str:
    if index == 0:
        return "embedding"
    name = mappings[0].huggingface[0][0].split(".")
    return ".".join(name[:3]) if name[1] == "layers" else "head"
