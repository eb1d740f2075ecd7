"""Where entropies come to light: their distribution by group over a step's trained tokens, and token by token for a few responses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_espo.algo import Annotation
from megatron_espo.data.packing import MicroBatch

BINS = 64


@dataclass(frozen=True)
class EntropyReport:
    """Entropies of one step, in nats.

    Attributes:
        edges: ``[BINS + 1]`` borders of the histogram's bins, from 0 to ``ln V``.
        counts: ``[groups][BINS]`` trained tokens; with several epochs each token counts once for every epoch.
        borders: ``[groups - 1]`` the lowest entropy above each border between groups, averaged over responses; NaN without responses.
        tokens: for each watched response its entropies and entropy groups; ``None`` for one that was not trained (no advantage).
    """

    edges: list[float]
    counts: list[list[int]]
    borders: list[float]
    tokens: list[tuple[list[float], list[int]] | None]

    def metrics(self) -> dict[str, float]:
        """``entropy/border1``, ... where there are any."""
        return {f"entropy/border{i}": value for i, value in enumerate(self.borders, 1) if not math.isnan(value)}


class EntropyRecorder:
    """Collects during a step what :class:`EntropyReport` holds. Every rank has one; only ``gather`` talks to others.

    Args:
        num_groups: entropy groups of the configuration.
        vocab_size: the true vocabulary.
        speaks: whether this rank's tokens count: tensor- and context-parallel ranks see the same whole responses, so one of them does.
        device: where the loss is.
    """

    def __init__(self, num_groups: int, vocab_size: int, *, speaks: bool, device: torch.device | str = "cpu") -> None:
        self.num_groups, self.speaks, self.device = num_groups, speaks, device
        self.highest = math.log(vocab_size)
        self.watch([])

    def watch(self, lengths: Sequence[int]) -> None:
        """Begin a step. ``lengths``: response tokens of each watched response, the same on every rank."""
        self.lengths = list(lengths)
        # float64 counts exactly. One flat tensor, so that one all-reduce takes everything.
        sizes = (self.num_groups * BINS, 2 * (self.num_groups - 1), 2 * sum(self.lengths))
        self._all = torch.zeros(sum(sizes), dtype=torch.float64, device=self.device)
        counts, borders, tokens = self._all.split(sizes)
        self._counts = counts
        self._borders = borders.view(2, -1)  # sum, number of responses
        self._tokens = [part.view(2, -1) for part in tokens.split([2 * length for length in self.lengths])]  # entropy, group + 1

    def observe(self, batch: MicroBatch, annotation: Annotation) -> None:
        """Take one micro-batch's entropies. Zero collectives."""
        if not self.speaks or not annotation.entropy.numel():
            return
        entropy, group = annotation.entropy.double(), annotation.group
        bins = (entropy / self.highest * BINS).long().clamp(0, BINS - 1)
        self._counts.index_add_(0, group * BINS + bins, torch.ones_like(entropy))
        for border in range(1, self.num_groups):
            above = entropy.where(group >= border, torch.inf)
            lowest = above.new_full((len(annotation.length),), torch.inf).scatter_reduce(0, annotation.response, above, "amin")
            found = lowest[lowest.isfinite()]
            self._borders[:, border - 1] += torch.stack([found.sum(), torch.ones_like(found).sum()])
        for number, start, end in zip(batch.watched, *_spans(batch.lengths), strict=True):
            if number is not None:
                self._tokens[number][0] = entropy[start:end]
                self._tokens[number][1] = group[start:end] + 1

    def gather(self) -> EntropyReport:
        """The step's report, on every rank: one all-reduce over all ranks."""
        dist.all_reduce(self._all)
        # Each response is on one data-parallel rank, so its sum over ranks is itself; the group is 0 where nobody had it.
        tokens = [
            (entropy.tolist(), (group.long() - 1).tolist()) if bool((group > 0).all()) else None
            for entropy, group in (part.cpu() for part in self._tokens)
        ]
        total, responses = self._borders.cpu()
        return EntropyReport(
            edges=[self.highest * i / BINS for i in range(BINS + 1)],
            counts=self._counts.view(-1, BINS).long().tolist(),
            borders=(total / responses).tolist(),
            tokens=tokens,
        )


def _spans(lengths: Tensor) -> tuple[list[int], list[int]]:
    """First and last + 1 token of each response."""
    ends = lengths.cumsum(0)
    return (ends - lengths).tolist(), ends.tolist()
