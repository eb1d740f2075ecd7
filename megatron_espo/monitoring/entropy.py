"""Records entropies of a step: histograms by group over all trained tokens, and the tokens of
logged samples.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_espo.algo import TokenSegments
from megatron_espo.data.packing import MicroBatch

BINS = 64


# Entropies (nats) and entropy groups of the trained tokens of a logged sample.
TokenEntropies = tuple[list[float], list[int]]


class EntropyRecorder:
    """Collects entropies during a step. Every rank has a recorder; only ``gather`` is collective.

    Args:
        num_groups: entropy groups of the configuration.
        vocab_size: the true vocabulary.
        device: device of the loss.
    """

    def __init__(self, num_groups: int, vocab_size: int, device: Any = "cpu") -> None:
        self.num_groups, self.device = num_groups, device
        self.highest = math.log(vocab_size)
        self.start_step([])

    def start_step(self, lengths: Sequence[int]) -> None:
        """Reset for a step.

        ``lengths``: response tokens of each logged sample, the same on every rank.
        """
        # float64 counts exactly.
        zeros = partial(torch.zeros, dtype=torch.float64, device=self.device)
        self._counts = zeros(self.num_groups, BINS)
        self._boundaries = zeros(2, self.num_groups - 1)  # sum, number of responses
        self._tokens = [zeros(2, length) for length in lengths]  # entropy, group + 1

    def record(self, batch: MicroBatch, segments: TokenSegments) -> None:
        """Add the entropies of one micro-batch. Zero collectives.

        Tensor- and context-parallel ranks see the same responses: call it on one of them.
        """
        entropy, group = segments.entropy.double(), segments.group
        bins = (entropy / self.highest * BINS).long().clamp(0, BINS - 1)
        self._counts.index_put_((group, bins), torch.ones_like(entropy), accumulate=True)
        for boundary in range(1, self.num_groups):
            above = entropy.where(group >= boundary, torch.inf)
            lowest = above.new_full((len(segments.length),), torch.inf)
            lowest = lowest.scatter_reduce(0, segments.response, above, "amin")
            found = lowest[lowest.isfinite()]
            self._boundaries[0, boundary - 1] += found.sum()
            self._boundaries[1, boundary - 1] += found.numel()
        tokens = torch.stack([entropy, (group + 1).double()]).split(batch.lengths.tolist(), dim=1)
        for number, values in zip(batch.logged_sample, tokens, strict=True):
            if number is not None:
                self._tokens[number].copy_(values)

    def gather(self) -> tuple[dict[str, Any], list[TokenEntropies | None]]:
        """The step's entropies on every rank. Two all-reduces over all ranks, and one for each
        logged sample.

        Returns:
            What ``entropy.jsonl`` has of a step. ``highest``: ``ln V``, the upper end of the
            histogram; the lower end is 0. ``counts``: ``[groups][BINS]`` trained tokens; with
            several epochs each token counts once for every epoch. ``boundaries``: ``[groups - 1]``
            the lowest entropy above each boundary between groups, mean over responses; ``None``
            without responses.

            The entropies of each logged sample; ``None`` if it was not trained (no advantage).
        """
        for values in (self._counts, self._boundaries, *self._tokens):
            if values.numel():
                dist.all_reduce(values)
        # One rank contributes each response, so the sum is its value. The group is 0 if no rank had
        # it.
        tokens = [
            (entropy.tolist(), (group.long() - 1).tolist()) if bool((group > 0).all()) else None
            for entropy, group in (part.cpu() for part in self._tokens)
        ]
        boundaries = self._boundaries.T.tolist()
        histogram = {
            "highest": self.highest,
            "counts": self._counts.long().tolist(),
            "boundaries": [total / number if number else None for total, number in boundaries],
        }
        return histogram, tokens
