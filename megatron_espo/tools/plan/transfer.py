"""The weight update: gathers, their ranks and memory, and the estimated time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import lcm, prod

import torch

from megatron_espo.config import Config
from megatron_espo.megatron.meta import BuiltRank, ParamShard
from megatron_espo.models.layouts import ShardLayout
from megatron_espo.models.mapping import ParamMapping
from megatron_espo.rollout.transport import needs_all_replicas
from megatron_espo.weights.exchange import Routes
from megatron_espo.weights.source import batches, gather_bytes


@dataclass(frozen=True)
class GroupPlan:
    """Tensors that are gathered and sent together: the embedding, one decoder layer, or the head.

    Attributes:
        stage: the pipeline stage that owns them.
        gathered_bytes: bytes of the whole tensors.
        peak_bytes: extra memory on a rank of the owning stage: the whole tensors, the last tensor
            of the previous group (vLLM's own transports still hold it), and the buffers of the
            largest collective.
    """

    stage: int
    tensors: int
    gathered_bytes: int
    peak_bytes: int


# A number of ranks, and the shapes of a rank's parameters of which so many ranks have a shard each.
Shards = tuple[int, list[tuple[int, ...]]]


@dataclass(frozen=True)
class Machine:
    """The GPUs of a run.

    Attributes:
        gpu_memory: usable bytes of one GPU.
        node_link, network, host_link: bytes a second and direction of a GPU inside a node, between
            nodes, and to host memory.
        gpus_per_node: GPUs of a node.
        expected_tokens: mean tokens of a prompt with its response; None: half of
            ``rollout.max_response_tokens``.
        on_gpu: false for a run without GPUs (tests compare such runs with the plan).
    """

    gpu_memory: int
    node_link: float
    network: float
    gpus_per_node: int
    host_link: float
    expected_tokens: int | None = None
    on_gpu: bool = True

    def link(self, ranks: Sequence[int]) -> float:
        """The slowest link that a collective over ``ranks`` crosses."""
        nodes = {rank // self.gpus_per_node for rank in ranks}
        return self.node_link if len(nodes) == 1 else self.network


@dataclass(frozen=True)
class Transfer:
    """One weight update.

    Attributes:
        sender: which rank hands the tensors to the engine.
        gather_s, pipeline_s, engine_s: estimated seconds inside stages or nodes, between them, and
            into the engine.
        seconds: of one update, in which ``pipeline_s`` and ``gather_s`` overlap.
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
    seconds: float
    received: list[list[int]]
    peak_bytes: int
    file_bytes: int
    groups: list[GroupPlan]


def plan_transfer(
    ranks: Sequence[BuiltRank],
    config: Config,
    groups: Sequence[Sequence[ParamMapping]],
    transport: str,
    world_size: int,
    machine: Machine,
) -> Transfer:
    """Follow ``WeightGatherer`` group by group.

    Args:
        ranks: from ``build_ranks``.
        groups: from ``ModelSpec.groups``.
        transport: ``files``, ``ipc`` or ``nccl``.
    """
    rollout, itemsize = config.rollout, getattr(torch, config.model.dtype).itemsize
    stage_ranks = world_size // config.megatron.pipeline_model_parallel_size
    # The ranks of a stage that gather; see ``WeightGatherer.participates``.
    sends_all = needs_all_replicas(transport, rollout.engines)
    sources = stage_ranks if sends_all else replica_ranks(config)
    # First Hugging Face name of each parameter -> its shards, with their stages.
    shards: dict[str, list[tuple[int, ParamShard]]] = {}
    for rank in ranks:
        for held in rank.held:
            shards.setdefault(held.mapping.huggingface[0][0], []).append((rank.stage, held))
    stages = max(rank.stage for rank in ranks) + 1
    takes_part = [at * stage_ranks + i for at in range(stages) for i in range(sources)]
    routes = Routes.of([rank // machine.gpus_per_node for rank in takes_part], sources)
    traffic = Traffic(routes, machine, takes_part, itemsize)
    plans: list[GroupPlan] = []
    last_tensor = 0
    room = gather_bytes(groups, itemsize) // itemsize
    for mappings in groups:
        holders = [shards[mapping.huggingface[0][0]] for mapping in mappings]
        stage = min(stage for stage, _ in holders[0])
        owned = [next(held for at, held in found if at == stage) for found in holders]
        shapes = [shape for mapping in mappings for _, shape in mapping.huggingface]
        size = sum(map(prod, shapes)) * itemsize
        gathers = [part for part in _shards(owned) if part[0] > 1 or stages > 1]
        buffers = traffic.add(gathers, stage, room)
        plans.append(GroupPlan(stage, len(shapes), size, last_tensor + size + buffers))
        last_tensor = 0 if transport == "files" else prod(shapes[-1]) * itemsize
    sizes = [group.gathered_bytes for group in plans]
    total, is_ipc = sum(sizes), transport == "ipc"
    # With ipc each worker of the engine reads the memory of its own GPU; nothing crosses a link.
    engine_s = 0.0 if is_ipc else total / machine.node_link
    if rollout.hosts:  # ``files`` writes to the shared folder, and the engine's node reads from it
        engine_s = (2 if transport == "files" else 1) * total / machine.network
    return Transfer(
        transport=transport,
        sender="the trainer's rank on the same GPU" if is_ipc else "rank 0",
        bytes=total,
        gather_s=traffic.gather_s,
        pipeline_s=traffic.send_s,
        engine_s=engine_s,
        seconds=traffic.seconds + engine_s,
        received=traffic.received,
        peak_bytes=max(group.peak_bytes for group in plans),
        # The groups use two files alternately.
        file_bytes=max(sizes[::2]) + max(sizes[1::2]) if transport == "files" else 0,
        groups=plans,
    )


def replica_ranks(config: Config) -> int:
    """Ranks of a stage that have one replica of its dense part and of its experts."""
    m = config.megatron
    expert_tp = m.expert_tensor_parallel_size or m.tensor_model_parallel_size
    return lcm(m.tensor_model_parallel_size, expert_tp * m.expert_model_parallel_size)


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

    def __init__(
        self, routes: Routes, machine: Machine, ranks: Sequence[int], itemsize: int
    ) -> None:
        self._routes, self._machine, self._ranks, self._itemsize = routes, machine, ranks, itemsize
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
        return size / self._machine.link(ranks) if len(ranks) > 1 else 0.0

    def _senders(self, rank: int, owner: int, size: int, each: int) -> Iterator[tuple[int, int]]:
        """Yield (sender, bytes) of what ``rank`` receives of one batch."""
        routes = self._routes
        if not routes.is_source(rank, owner):
            yield routes.rail(rank)[routes.source(owner)], each
        elif (sender := routes.sender(rank, owner)) != rank:
            yield sender, each * routes.parts(size)
        yield from ((other, each) for other in routes.gather(rank, size) if other != rank)

    def _node(self, rank: int) -> int:
        return self._ranks[rank] // self._machine.gpus_per_node


def _shards(held: Sequence[ParamShard]) -> list[Shards]:
    """A group's parameters: those that each rank has whole, dense shards, experts."""
    whole: list[tuple[int, ...]] = []
    found: list[Shards] = []
    for is_expert in (False, True):
        kind = [shard for shard in held if (shard.mapping.expert is not None) == is_expert]
        size = len({rank for shard in kind for rank in shard.sharing})
        split = [s for s in kind if size > 1 and s.mapping.layout is not ShardLayout.REPLICATED]
        whole += [s.shape for s in kind if size == 1 or s.mapping.layout is ShardLayout.REPLICATED]
        # Of the experts only those of the first rank.
        if shapes := [shard.shape for shard in split if shard.sharing == split[0].sharing]:
            found.append((size, shapes))
    return [(1, whole), *found] if whole else found
