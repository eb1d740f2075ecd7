"""The weight update: gathers, their ranks and memory, and the estimated time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import lcm, prod

import torch

from megatron_espo.config import Config
from megatron_espo.megatron.meta import BuiltRank, ParamShard
from megatron_espo.models.layouts import ShardLayout
from megatron_espo.models.mapping import ParamMapping
from megatron_espo.rollout.transport import ipc_buffer_bytes, needs_all_replicas
from megatron_espo.weights.exchange import Routes
from megatron_espo.weights.source import batches, gather_bytes

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
    """

    gpu_memory: int
    node_link: float
    network: float
    gpus_per_node: int
    host_link: float
    expected_tokens: int | None = None


@dataclass(frozen=True)
class Transfer:
    """One weight update.

    Attributes:
        gather_s, pipeline_s, engine_s: estimated seconds inside stages or nodes, between them, and
            into the engine.
        seconds: of one update, in which ``pipeline_s`` and ``gather_s`` overlap.
        received: for each stage the bytes that a GPU (its first) receives over the network, and
            inside its node.
        peak_bytes: largest extra memory of a rank: a group's whole tensors, the last tensor of the
            previous group (vLLM's own transports still hold it), the buffers of the largest
            collective, and the buffer of ``ipc``.
        groups: owning stage and bytes of the whole tensors of the embedding, of each decoder layer,
            and of the head. A group is gathered and sent together.
    """

    transport: str
    bytes: int
    gather_s: float
    pipeline_s: float
    engine_s: float
    seconds: float
    received: list[list[int]]
    peak_bytes: int
    groups: list[tuple[int, int]]


def plan_transfer(
    ranks: Sequence[BuiltRank], config: Config, groups: Sequence[Sequence[ParamMapping]],
    transport: str, world_size: int, machine: Machine,
) -> Transfer:  # fmt: skip
    """Follow ``WeightGatherer`` group by group.

    Args:
        ranks: from ``build_ranks``.
        groups: from ``ModelSpec.groups``.
        transport: ``files``, ``ipc`` or ``nccl``.
    """
    rollout, itemsize = config.rollout, getattr(torch, config.model.dtype).itemsize
    stages = config.megatron.pipeline_model_parallel_size
    stage_ranks = world_size // stages
    # The ranks of a stage that gather; see ``WeightGatherer.participates``.
    sends_all = needs_all_replicas(transport, rollout.engines)
    sources = stage_ranks if sends_all else replica_ranks(config)
    # First Hugging Face name of each parameter -> the first stage that holds it, and a shard.
    owners: dict[str, tuple[int, ParamShard]] = {}
    for rank in ranks:
        for shard in rank.held:
            owners.setdefault(shard.mapping.huggingface[0][0], (rank.stage, shard))
    takes_part = [at * stage_ranks + i for at in range(stages) for i in range(sources)]
    nodes = [rank // machine.gpus_per_node for rank in takes_part]
    traffic = Traffic(nodes, sources, machine, itemsize)
    sizes: list[tuple[int, int]] = []
    last_tensor = peak = largest = 0
    room = gather_bytes(groups, itemsize) // itemsize
    for mappings in groups:
        owned = [owners[mapping.huggingface[0][0]] for mapping in mappings]
        stage = owned[0][0]
        shapes = [shape for mapping in mappings for _, shape in mapping.huggingface]
        size, largest = sum(map(prod, shapes)) * itemsize, max(largest, *map(prod, shapes))
        parts = _shards([shard for _, shard in owned])
        buffers = traffic.add([part for part in parts if part[0] > 1 or stages > 1], stage, room)
        peak = max(peak, last_tensor + size + buffers)
        last_tensor = 0 if transport == "files" else prod(shapes[-1]) * itemsize
        sizes.append((stage, size))
    if transport == "ipc":
        peak += ipc_buffer_bytes(largest * itemsize)
    total = sum(size for _, size in sizes)
    # With ipc each worker of the engine reads the memory of its own GPU; nothing crosses a link.
    engine_s = 0.0 if transport == "ipc" else total / machine.node_link
    if rollout.hosts:  # ``files`` writes to the shared folder, and the engine's node reads from it
        engine_s = (2 if transport == "files" else 1) * total / machine.network
    return Transfer(
        transport=transport,
        bytes=total,
        gather_s=traffic.gather_s,
        pipeline_s=traffic.send_s,
        engine_s=engine_s,
        seconds=traffic.seconds + engine_s,
        received=traffic.received,
        peak_bytes=peak,
        groups=sizes,
    )


def replica_ranks(config: Config) -> int:
    """Ranks of a stage that have one replica of its dense part and of its experts."""
    m = config.megatron
    expert_tp = m.expert_tensor_parallel_size or m.tensor_model_parallel_size
    return lcm(m.tensor_model_parallel_size, expert_tp * m.expert_model_parallel_size)


class Traffic:
    """Adds up time and received bytes of ``Exchange``.

    Args:
        nodes: of the ranks that take part.
        stage: ranks of a stage that take part.
        itemsize: bytes of an element.

    Attributes:
        send_s, gather_s, seconds: between stages, inside them or their nodes, and of both together.
        received: for each stage the bytes that its first rank receives: over the network, inside
            its node.
    """

    def __init__(self, nodes: Sequence[int], stage: int, machine: Machine, itemsize: int) -> None:
        self._nodes, self._machine, self._itemsize = nodes, machine, itemsize
        self._routes = Routes.of(nodes, stage)
        self.send_s = self.gather_s = self.seconds = 0.0
        self.received = [[0, 0] for _ in range(0, len(nodes), stage)]

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
                        received[self._nodes[sender] == self._nodes[rank]] += size_sent
        self.send_s += sum(sent)
        self.gather_s += sum(gathered)
        # A batch is gathered while the next one is sent.
        self.seconds += sum(map(max, [0.0, *gathered], [*sent, 0.0]))
        return 2 * max(wholes) + max(buffers)

    def _seconds(self, size: int, members: range) -> float:
        """Time of ``size`` bytes on the slowest link between ``members``."""
        if len(members) == 1:
            return 0.0
        machine, is_node = self._machine, len({self._nodes[member] for member in members}) == 1
        return size / (machine.node_link if is_node else machine.network)

    def _senders(self, rank: int, owner: int, size: int, each: int) -> Iterator[tuple[int, int]]:
        """Yield (sender, bytes) of what ``rank`` receives of one batch."""
        routes = self._routes
        if not routes.is_source(rank, owner):
            yield routes.rail(rank)[routes.source(owner)], each
        elif (sender := routes.sender(rank, owner)) != rank:
            yield sender, each * routes.parts(size)
        yield from ((other, each) for other in routes.gather(rank, size) if other != rank)


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
