"""The weight update: gathers, their ranks and memory, and the estimated time."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from megatron_espo.megatron.meta import BuiltRank, ParamShard
from megatron_espo.models.families import ParamMapping
from megatron_espo.models.layouts import ShardLayout
from megatron_espo.weights.source import batches, gather_bytes


@dataclass(frozen=True)
class GroupPlan:
    """Tensors that are gathered and sent together: the embedding, one decoder layer, or the head.

    Attributes:
        gathered_bytes: bytes of the whole tensors.
        shard_bytes: the most that one rank contributes, of its dense part or of its experts.
        gather_ranks: ranks of that gather.
        peak_bytes: extra memory on a rank of the owning stage: the whole tensors, the last tensor
            of the previous group (vLLM's own transports still hold it), and the buffers of the
            largest collective.
    """

    name: str
    stage: int
    tensors: int
    gathered_bytes: int
    shard_bytes: int
    gather_ranks: int
    peak_bytes: int


class Gather(NamedTuple):
    """One gather: bytes from each rank, the ranks, and the shapes of each rank's shards."""

    bytes: int
    members: tuple[int, ...]
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
        gather_s, pipeline_s, engine_s: estimated seconds; they do not overlap.
        peak_bytes: largest extra memory of a rank, on the model's device.
        file_bytes: host memory (with ``rollout.hosts``: disk space) of the two files of ``files``.
    """

    transport: str
    sender: str
    bytes: int
    gather_s: float
    pipeline_s: float
    engine_s: float
    peak_bytes: int
    file_bytes: int
    groups: tuple[GroupPlan, ...]

    @property
    def seconds(self) -> float:
        """Estimated seconds of one update."""
        return self.gather_s + self.pipeline_s + self.engine_s


def plan_transfer(
    ranks: Sequence[BuiltRank],
    groups: Sequence[Sequence[ParamMapping]],
    itemsize: int,
    transport: str,
    stage_ranks: int,
    links: Links,
    copies_to_nodes: int = 0,
) -> Transfer:
    """Follow ``WeightGatherer`` group by group.

    Args:
        ranks: from ``build_ranks``.
        groups: from ``families.model_groups``.
        itemsize: bytes of an element that the engine receives.
        transport: ``files``, ``ipc`` or ``nccl``.
        stage_ranks: ranks of a pipeline stage.
        copies_to_nodes: how often an engine's owner sends all bytes to another node, where the
            engine is; 0: the engine is on the owner's node.
    """
    # First Hugging Face name of each parameter -> its shards, with their stages.
    shards: dict[str, list[tuple[int, ParamShard]]] = {}
    for rank in ranks:
        for held in rank.held:
            shards.setdefault(held.mapping.huggingface[0][0], []).append((rank.stage, held))
    stages = max(rank.stage for rank in ranks) + 1
    plans: list[GroupPlan] = []
    gather_s = pipeline_s = 0.0
    last_tensor = 0
    room = gather_bytes(groups, itemsize) // itemsize
    for index, mappings in enumerate(groups):
        holders = [shards[mapping.huggingface[0][0]] for mapping in mappings]
        stage = min(stage for stage, _ in holders[0])
        owned = [next(held for at, held in found if at == stage) for found in holders]
        shapes = [shape for mapping in mappings for _, shape in mapping.huggingface]
        size = sum(map(prod, shapes)) * itemsize
        gathers = _gathers(owned, itemsize)
        buffers = [_buffer_bytes(gather, room, itemsize) for gather in gathers]
        if stages > 1:
            buffers.append(_buffer_elements(shapes, room) * itemsize)
            pipeline_s += size / links.between(range(0, stages * stage_ranks, stage_ranks))
        largest = max(gathers, key=lambda g: g.bytes * len(g.members), default=Gather(0, (0,), ()))
        gather_s += sum(g.bytes * (len(g.members) - 1) / links.between(g.members) for g in gathers)
        plans.append(
            GroupPlan(
                name=_group_name(index, mappings),
                stage=stage,
                tensors=len(shapes),
                gathered_bytes=size,
                shard_bytes=largest.bytes,
                gather_ranks=len(largest.members),
                peak_bytes=last_tensor + size + max(buffers, default=0),
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
        gather_s=gather_s,
        pipeline_s=pipeline_s,
        engine_s=engine_s,
        peak_bytes=max(group.peak_bytes for group in plans),
        # The groups use two files alternately.
        file_bytes=max(sizes[::2]) + max(sizes[1::2]) if transport == "files" else 0,
        groups=tuple(plans),
    )


def _gathers(shards: Sequence[ParamShard], itemsize: int) -> list[Gather]:
    """The gathers of one group: dense shards, then experts."""
    gathers = []
    for is_expert in (False, True):
        part = [
            shard
            for shard in shards
            if shard.is_expert == is_expert and shard.mapping.layout is not ShardLayout.REPLICATED
        ]
        if part:
            members = tuple(sorted({rank for shard in part for rank in shard.sharing}))
            shapes = tuple(shard.shape for shard in part if shard.sharing == part[0].sharing)
            gathers.append(Gather(sum(map(prod, shapes)) * itemsize, members, shapes))
    return gathers


def _buffer_bytes(gather: Gather, room: int, itemsize: int) -> int:
    """Send and receive buffers of the largest collective."""
    n = len(gather.members)
    return _buffer_elements(gather.shapes, room // n) * (n + 1) * itemsize if n > 1 else 0


def _buffer_elements(shapes: Sequence[Sequence[int]], limit: int) -> int:
    rows = [prod(shape[1:]) for shape in shapes]
    return max(
        sum((part.stop - part.start) * rows[i] for i, part in batch)
        for batch in batches(shapes, limit)
    )


def _group_name(index: int, mappings: Sequence[ParamMapping]) -> str:
    if index == 0:
        return "embedding"
    name = mappings[0].huggingface[0][0].split(".")
    return ".".join(name[:3]) if name[1] == "layers" else "head"
