"""Bring one pipeline stage's shards to all ranks. Over the network each byte enters a node once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_espo.models.mapping import ParamMapping

# Parts of tensors: the position of a tensor, and its rows.
Rows = list[tuple[int, slice]]
# For each shard, these parts of its tensors.
Blocks = Iterator[list[torch.Tensor]]


@dataclass(frozen=True)
class Routes:
    """Which ranks exchange shards. A rank is an index among the ranks that take part.

    The ranks of a stage are consecutive, and so are those of a node. The ranks of a node divide the
    shards into equal parts. Each rank receives its part from the rank with the same index on the
    owning stage's node (their *rail*), then all ranks of the node gather the parts. If several
    stages share a node, the owner first broadcasts its shard to their ranks on its own node.

    Attributes:
        ranks: number of ranks.
        stage: ranks of a pipeline stage.
        node: ranks of a node. Equal to ``ranks`` if the network is not used, or if stages and nodes
            do not divide each other: then the owner broadcasts its shard to all stages, and the
            ranks of each stage gather the shards.
    """

    ranks: int
    stage: int
    node: int

    @classmethod
    def of(cls, nodes: Sequence[Any], stage: int) -> "Routes":
        """Return the routes for ranks on these nodes, given the ranks of a stage."""
        ranks, node = len(nodes), list(nodes).count(nodes[0])
        blocks = [nodes[rank // node * node] for rank in range(ranks)]
        is_even = list(nodes) == blocks and len(set(nodes)) * node == ranks
        divides = stage % node == 0 or node % stage == 0
        return cls(ranks, stage, node if is_even and divides and stage < ranks else ranks)

    @property
    def use_network(self) -> bool:
        """Whether parts of shards cross the network."""
        return self.node < self.ranks

    def parts(self, size: int) -> int:
        """Return the parts of each of ``size`` shards; rank ``r`` has part ``r % node // size``."""
        return self.node // size if self.use_network and self.node % size == 0 else 1

    def of_node(self, rank: int) -> range:
        """Return the ranks on the node of ``rank``."""
        first = rank // self.node * self.node
        return range(first, first + self.node)

    def pipeline(self, rank: int) -> range:
        """Return the ranks of its node that have the same shards, one of each stage."""
        node = self.of_node(rank)
        return node[(rank - node.start) % self.stage :: self.stage]

    def sender(self, rank: int, owner: int) -> int:
        """Return the rank of stage ``owner`` in the pipeline of a rank that ``is_source``."""
        return self.pipeline(rank)[owner - self.of_node(rank).start // self.stage]

    def rail(self, rank: int) -> range:
        """Return the ranks with the same index on one node of each stage, or on every node."""
        return range(rank % self._block, self.ranks, self._block)

    def source(self, owner: int) -> int:
        """Return the index in every rail of the rank that sends the shards of stage ``owner``."""
        return owner * self.stage // self._block

    def is_source(self, rank: int, owner: int) -> bool:
        """Whether ``rank`` is on a node that has the shards of stage ``owner``."""
        return rank // self._block == self.source(owner)

    def gather(self, rank: int, size: int) -> range:
        """Return the ranks that gather all parts of ``size`` shards with ``rank``."""
        members = self.parts(size) * size
        return range(rank // members * members, (rank // members + 1) * members)

    @property
    def _block(self) -> int:
        return max(self.stage, self.node)


class Shards(NamedTuple):
    """Parameters of one group of which each of ``size`` ranks has a shard.

    Attributes:
        group: the group of these ranks; None and ``size`` 1 if each rank of the stage has the
            whole.
        mappings: for each expert-parallel rank its parameters; one list for dense parameters.
        shapes: of one rank's shards, equal on all ranks.
        tensors: this rank's shards; None on other stages.
    """

    group: Any
    size: int
    mappings: list[list[ParamMapping]]
    shapes: list[tuple[int, ...]]
    tensors: list[torch.Tensor] | None


class Exchange:
    """The collectives of :class:`Routes`. Collective over all ranks: it may make process groups.

    Args:
        routes: of the ranks that take part.
        ranks: their global ranks.
        pp: the pipeline-parallel group; None: shards stay in their stage.
        shared: the groups whose ranks have shards of the same parameters.
        like: gives dtype and device of the stream.
    """

    def __init__(
        self, routes: Routes, ranks: Sequence[int], pp: Any, shared: Sequence[Any],
        like: torch.Tensor,
    ) -> None:  # fmt: skip
        self._routes, self._like = routes, like
        self._pipeline, self._rail, self._node = pp, None, None
        if routes.use_network:
            pipelines, rails, nodes = (
                tuple(sorted({tuple(ranks[i] for i in of(rank)) for rank in range(routes.ranks)}))
                for of in (routes.pipeline, routes.rail, routes.of_node)
            )
            is_node = [group for group in shared if group.size() == routes.node]
            world = dist.group.WORLD
            self._pipeline = _own_group(world, pipelines)
            self._rail = pp if routes.stage >= routes.node else _own_group(world, rails)
            self._node = is_node[0] if is_node else _own_group(world, nodes)
        if dist.get_rank() in ranks:
            self._rank = ranks.index(dist.get_rank())
            self._first_stage = routes.of_node(self._rank).start // routes.stage

    def start(self, shards: Shards, rows: Rows, owner: int) -> Callable[[], Blocks]:
        """Send rows of stage ``owner`` to the other stages, without waiting on a GPU or CPU.

        Returns:
            A function that gathers them. It yields the blocks of each shard, on every rank.
        """
        routes, parts = self._routes, self._routes.parts(shards.size)
        shapes = [(part.stop - part.start, *shards.shapes[i][1:]) for i, part in rows]
        each, work = -(-sum(map(prod, shapes)) // parts), None
        if self._rail is None or routes.is_source(self._rank, owner):
            whole = self._like.new_empty(parts * each)
            if shards.tensors is not None:
                for view, (i, part) in zip(_views(whole, shapes), rows, strict=True):
                    view.copy_(shards.tensors[i][part])
            if self._pipeline is not None:
                source = dist.get_global_rank(self._pipeline, owner - self._first_stage)
                work = dist.broadcast(whole, source, group=self._pipeline, async_op=True)
            own = whole.chunk(parts)[self._rank % routes.node // shards.size % parts]
        else:
            own = self._like.new_empty(each)
        if self._rail is not None:
            if work is not None:
                work.wait()
            source = dist.get_global_rank(self._rail, routes.source(owner))
            work = dist.broadcast(own, source, group=self._rail, async_op=True)
        group = self._node if parts > 1 else shards.group

        def finish() -> Blocks:
            gathered = own
            if work is not None:
                work.wait()
            if group is not None:
                gathered = own.new_empty(group.size() * each)
                dist.all_gather_into_tensor(gathered, own, group=group)
            by_part = gathered.view(-1, shards.size, each)
            for rank in range(shards.size):
                yield _views(by_part[:, rank].reshape(-1), shapes)

        return finish


@cache  # makes groups once for each default process group: communicators take memory
def _own_group(world: Any, members: tuple[tuple[int, ...], ...]) -> Any:
    """Return the process group of this rank's members; None if it has no others."""
    if len(members[0]) == 1:
        return None
    return dist.new_subgroups_by_enumeration(list(map(list, members)))[0]


def _views(flat: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return views of these shapes; what is left at the end is padding."""
    sizes = [prod(shape) for shape in shapes]
    parts = flat[: sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
