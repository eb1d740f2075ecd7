"""What is gathered from which ranks on the way into the engine, how much memory that takes, and how long."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from megatron_espo.mcore.meta import BuiltRank, Held
from megatron_espo.weights.families import Mapping
from megatron_espo.weights.layouts import Layout
from megatron_espo.weights.source import batches, gather_bytes

Groups = Sequence[Sequence[Mapping]]


@dataclass(frozen=True)
class GroupPlan:
    """The embedding, one decoder layer, or the head: what is gathered and sent at once.

    Attributes:
        gathered_bytes: whole tensors.
        shard_bytes: most that a rank contributes, of its dense part or of its experts.
        gather_ranks: ranks that it is shared with.
        peak_bytes: extra memory on a rank of the owning stage meanwhile: the whole tensors, the last tensor of the group
            before (which vLLM's own transports still hold), and the buffers of the largest collective.
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
        transport: ``files``, ``ipc`` or ``nccl``.
        stage_ranks: ranks of a pipeline stage.
        copies_to_nodes: how often an engine's owner sends everything to the engine's node; 0: the owner is on that node too.
    """
    sources = _sources(ranks)
    stages = max(rank.stage for rank in ranks) + 1
    plans: list[GroupPlan] = []
    gather_s = pipeline_s = 0.0
    previous = 0
    room = gather_bytes(groups, itemsize) // itemsize
    for index, mappings in enumerate(groups):
        holders = [sources[mapping.huggingface[0][0]] for mapping in mappings]
        stage = min(stage for stage, _ in holders[0])
        shards = [[held for at, held in found if at == stage] for found in holders]
        shapes = [shape for mapping in mappings for _, shape in mapping.huggingface]
        size = sum(map(prod, shapes)) * itemsize
        gathers = _gathers([held for copies in shards for held in copies[:1]], itemsize)
        buffers = [_buffer_bytes(gather, room, itemsize) for gather in gathers]
        if stages > 1:
            buffers.append(_buffer_elements(shapes, room) * itemsize)
        shard_bytes, members, _ = max(gathers, key=lambda gather: gather.bytes * len(gather.members), default=Gather(0, (0,), ()))
        peak_bytes = previous + size + max(buffers, default=0)
        previous = 0 if transport == "files" else prod(shapes[-1]) * itemsize
        group = GroupPlan(_group_name(index, mappings), stage, len(shapes), size, shard_bytes, len(members), peak_bytes)
        gather_s += sum(shard * (len(among) - 1) / links.between(among) for shard, among, _ in gathers)
        if stages > 1:
            pipeline_s += size / links.between(range(0, stages * stage_ranks, stage_ranks))
        plans.append(group)
    total = sum(group.gathered_bytes for group in plans)
    # With ipc each worker of the engine reads from the memory of its own GPU; nothing crosses a link.
    engine_s = 0.0 if transport == "ipc" else total / links.gpu
    if copies_to_nodes:
        engine_s = copies_to_nodes * total / links.network
    sender = "the trainer's rank on the same GPU" if transport == "ipc" else "rank 0"
    seconds = (gather_s, pipeline_s, engine_s)
    peak_bytes = max(group.peak_bytes for group in plans)
    file_bytes = _file_bytes(plans) if transport == "files" else 0
    return Transfer(transport, sender, total, *seconds, peak_bytes, file_bytes, tuple(plans))


def _file_bytes(plans: Sequence[GroupPlan]) -> int:
    """Bytes of the two files that the groups use in turn."""
    sizes = [group.gathered_bytes for group in plans]
    return max(sizes[::2]) + max(sizes[1::2])


def _sources(ranks: Sequence[BuiltRank]) -> dict[str, list[tuple[int, Held]]]:
    """First Hugging Face name of each parameter -> the stages that hold it, with how."""
    found: dict[str, list[tuple[int, Held]]] = {}
    for rank in ranks:
        for held in rank.held:
            found.setdefault(held.mapping.huggingface[0][0], []).append((rank.stage, held))
    return found


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
