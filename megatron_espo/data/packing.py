"""Packs sequences into micro-batches, balanced over data-parallel ranks. Zero collectives.

Every rank calls :func:`pack` with the same sequences and takes its own micro-batches, so ranks need
no communication.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_espo.data.batches import BatchTotals, MicroBatch, TrainSequence
from megatron_espo.data.context_parallel import slice_micro_batch


def batch_totals(
    sequences: Sequence[TrainSequence], *, num_responses: int, num_response_tokens: int
) -> BatchTotals:
    """Totals of an optimizer step. ``sequences`` are those that need a gradient."""
    return BatchTotals(
        num_responses, num_response_tokens, max(1, sum(s.num_tokens for s in sequences))
    )


# Sequences that are laid out together: a single one, or several with the same prompt.
PrefixGroup = list[TrainSequence]


@dataclass(frozen=True)
class PackingSpec:
    """How :func:`pack` cuts sequences into micro-batches.

    Attributes:
        max_tokens: most tokens (prompts included) of a micro-batch over all context-parallel ranks.
            Padding counts in padded micro-batches only.
        data_parallel_rank, data_parallel_size: rank that gets the micro-batches, and number of
            ranks.
        max_sequences: most sequences of a micro-batch; ``None``: no limit.
        multiple_of: each rank's number of tokens is padded to a multiple (sequence parallelism
            shards the tokens).
        count_multiple_of: the number of micro-batches is padded to a multiple (the interleaved
            schedule needs one of the pipeline size).
        context_parallel_rank, context_parallel_size: part of every sequence, and number of parts.
        share_prompts: responses to the same prompt share one copy of it. The gradient is the same.
            Needs :class:`megatron_espo.megatron.attention.PackedDotProductAttention`.
        padded: one row for each sequence, as long as the longest, for attention that does not take
            packed sequences.
        uniform: all micro-batches of a rank get the same shape, so that pipeline stages do not
            exchange shapes.

    Raises:
        ValueError: shared prompts together with context parallelism or padding.
    """

    max_tokens: int
    data_parallel_rank: int
    data_parallel_size: int
    max_sequences: int | None = None
    multiple_of: int = 1
    count_multiple_of: int = 1
    context_parallel_rank: int = 0
    context_parallel_size: int = 1
    share_prompts: bool = False
    padded: bool = False
    uniform: bool = False

    def __post_init__(self) -> None:
        if self.share_prompts and (self.padded or self.context_parallel_size > 1):
            raise ValueError(
                "share_prompts: expected false with context_parallel_size > 1 or padded rows, "
                "got true"
            )

    @property
    def sequence_multiple(self) -> int:
        """The length of each packed sequence is padded to a multiple of this number."""
        return 1 if self.context_parallel_size == 1 else 2 * self.context_parallel_size

    @property
    def total_multiple(self) -> int:
        """The length of the micro-batch over all context-parallel ranks is padded to a multiple of
        this number.
        """
        size = self.context_parallel_size
        return self.multiple_of if size == 1 else size * math.lcm(2, self.multiple_of)


def pack(
    sequences: Sequence[TrainSequence], totals: BatchTotals, spec: PackingSpec
) -> list[MicroBatch]:
    """Cut ``sequences`` into micro-batches and return those of one data-parallel rank.

    Every rank gets the same number of micro-batches (empty ones where it has fewer sequences),
    because each micro-batch runs collectives. A sequence longer than ``spec.max_tokens`` gets a
    micro-batch of its own.

    Args:
        sequences: of the whole step, the same on every rank.
        totals: of the whole step.
        spec: limits, layout and rank.
    """
    ranks = shard_by_tokens(sequences, spec.data_parallel_size, spec.share_prompts)
    shards = [_bins([[sequences[i] for i in group] for group in rank], spec) for rank in ranks]
    count = _round_up(max(1, *map(len, shards)), spec.count_multiple_of)
    own = shards[spec.data_parallel_rank]
    bins = own + [[]] * (count - len(own))
    shapes = [_shape(groups, spec) for groups in bins]
    if spec.uniform:
        shapes = [(max(rows for rows, _ in shapes), max(length for _, length in shapes))] * count
    memory = _Memory(bins, shapes)
    batches = [_micro_batch(*item, totals, spec, memory) for item in zip(bins, shapes, strict=True)]
    if spec.context_parallel_size > 1:
        part = (spec.context_parallel_rank, spec.context_parallel_size)
        batches = [slice_micro_batch(batch, *part) for batch in batches]
    return [_in_rows(batch) for batch in batches] if spec.padded else batches


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _shape(groups: list[PrefixGroup], spec: PackingSpec) -> tuple[int, int]:
    """``(rows, length)`` of a micro-batch; one row if it is packed."""
    if spec.padded:
        longest = max(map(_cost, groups), default=1)
        return max(1, len(groups)), _round_up(longest, spec.total_multiple)
    total = sum(_round_up(_cost(group), spec.sequence_multiple) for group in groups)
    return 1, _round_up(max(1, total), spec.total_multiple)


def _cost(group: PrefixGroup) -> int:
    """Tokens of the group that go through the model."""
    return len(group[0].prompt_ids) + sum([len(sequence.response_ids) for sequence in group])


def shard_by_tokens(
    sequences: Sequence[TrainSequence], ranks: int, share_prompts: bool = False
) -> list[list[list[int]]]:
    """Indices of the sequences of each data-parallel rank, grouped by shared prompt.

    The longest group goes to the rank with the fewest tokens so far, then the next one.
    """
    groups: dict[Any, list[int]] = {}
    for i, sequence in enumerate(sequences):
        groups.setdefault(sequence.prompt_ids.tobytes() if share_prompts else i, []).append(i)
    costs = [(_cost([sequences[i] for i in group]), group) for group in groups.values()]
    shards: list[list[list[int]]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for cost, group in sorted(costs, key=lambda item: item[0], reverse=True):
        rank = load.index(min(load))
        shards[rank].append(group)
        load[rank] += cost
    return shards


def _bins(groups: list[PrefixGroup], spec: PackingSpec) -> list[list[PrefixGroup]]:
    """First fit.

    The groups come longest first, so the first group of a padded micro-batch is its longest row.
    """
    bins: list[list[PrefixGroup]] = []
    # Of each bin: tokens, sequences, tokens of its first group. Rows after the last bin are 0.
    load, count, longest = np.zeros((3, len(groups)), np.int64)
    for group in groups:
        cost = _cost(group)
        used = slice(len(bins))
        tokens = longest[used] * (count[used] + 1) if spec.padded else load[used] + cost
        fits = tokens <= spec.max_tokens
        if spec.max_sequences is not None:
            fits &= count[used] + len(group) <= spec.max_sequences
        number = int(fits.argmax()) if fits.any() else len(bins)
        if number == len(bins):
            bins.append([])
            longest[number] = cost
        bins[number].append(group)
        load[number] += cost
        count[number] += len(group)
    return bins


class _Memory:
    """Memory of the per-token tensors of all micro-batches of a rank.

    A few large blocks take a fraction of the time of thousands of small ones, because the operating
    system maps them in large pages.
    """

    def __init__(self, bins: list[list[PrefixGroup]], shapes: list[tuple[int, int]]) -> None:
        sequences = [sequence for groups in bins for group in groups for sequence in group]
        trained = sum(sequence.num_trained for sequence in sequences)
        total = sum(rows * length for rows, length in shapes)
        known = sum(
            sequence.num_trained
            for sequence in sequences
            for values in (sequence.old_logprobs, sequence.old_entropies)
            if values is not None
        )
        self._words = np.empty(2 * total + 2 * trained, np.int32)
        self._floats = np.empty(2 * trained + known, np.float32)
        # 0, 1, 2, ...
        self.index = np.arange(max(rows * length for rows, length in shapes), dtype=np.int32)

    def words(self, count: int) -> np.ndarray:
        """``[count]`` int32, not initialized."""
        taken, self._words = self._words[:count], self._words[count:]
        return taken

    def floats(self, count: int) -> np.ndarray:
        """``[count]`` float32, not initialized."""
        taken, self._floats = self._floats[:count], self._floats[count:]
        return taken


def _lay_out(
    group: PrefixGroup, tokens: np.ndarray, positions: np.ndarray, index: np.ndarray, start: int
) -> tuple[list[np.ndarray], tuple[int, ...]]:
    """Write token ids and position ids of one group, from ``start`` on.

    A lone sequence is all prefix. A shared prefix is the prompt without its last token. That token
    starts every suffix, so that each response token is predicted from a position of its own. A
    suffix omits the last response token, which predicts nothing.

    Args:
        group: one sequence, or several with the same prompt.
        tokens, positions: ``[tokens of the micro-batch]`` int32, filled here.
        index: int32, 0, 1, 2, ..., at least as long.
        start: first position of the group in the micro-batch.

    Returns:
        The positions that predict the trained tokens, by sequence, and the lengths of the prefix
            and the suffixes.
    """
    prompt = group[0].prompt_ids
    if len(group) == 1:
        first = start + len(prompt)
        end = first + len(group[0].response_ids)
        tokens[start:first], tokens[first:end] = prompt, group[0].response_ids
        positions[start:end] = index[: end - start]
        # The hidden state one position earlier predicts a token.
        return [group[0].trained(index[first - 1 : end - 1])], (end - start,)
    prefix = len(prompt) - 1
    first = start + prefix
    tokens[start:first], positions[start:first] = prompt[:-1], index[:prefix]
    logit_positions, lengths = [], [prefix]
    for sequence in group:
        length = len(sequence.response_ids)
        end = first + length
        tokens[first], tokens[first + 1 : end] = prompt[-1], sequence.response_ids[:-1]
        positions[first:end] = index[prefix : prefix + length]
        logit_positions.append(sequence.trained(index[first:end]))
        lengths.append(length)
        first = end
    return logit_positions, tuple(lengths)


def _micro_batch(
    groups: list[PrefixGroup],
    shape: tuple[int, int],
    totals: BatchTotals,
    spec: PackingSpec,
    memory: _Memory,
) -> MicroBatch:
    """Lay groups out one after the other and pad them, each one and all together, to ``shape``
    (rows, length).
    """
    rows, length = shape
    tokens, positions = memory.words(rows * length), memory.words(rows * length)
    index = memory.index
    multiple = length if spec.padded else spec.sequence_multiple
    logit_positions: list[np.ndarray] = []
    prefix_groups: list[tuple[int, ...]] = []
    boundaries = [0]
    for group in groups:
        start = boundaries[-1]
        places, lengths = _lay_out(group, tokens, positions, index, start)
        logit_positions += places
        end = start + sum(lengths)
        # Padding comes after the end of a sequence: no response token attends to it.
        padding = (start - end) % multiple
        tokens[end : end + padding] = 0
        positions[end : end + padding] = index[end - start : end - start + padding]
        prefix_groups.append(lengths if not padding else (end - start + padding,))
        boundaries.append(end + padding)
    # Short sequences fill the rest, because their attention costs little.
    filler = length if spec.padded else _round_up(64, multiple)
    while rest := rows * length - boundaries[-1]:
        filled = min(filler, rest)
        tokens[boundaries[-1] : boundaries[-1] + filled] = 0
        positions[boundaries[-1] : boundaries[-1] + filled] = index[:filled]
        prefix_groups.append((filled,))
        boundaries.append(boundaries[-1] + filled)
    sequences = [sequence for group in groups for sequence in group]
    trained = np.array([sequence.num_trained for sequence in sequences], np.int64)
    advantages = np.array([sequence.advantage for sequence in sequences], np.float32)
    count = int(trained.sum())
    shared = any(len(lengths) > 1 for lengths in prefix_groups)
    return MicroBatch(
        tokens=torch.from_numpy(tokens)[None],
        position_ids=torch.from_numpy(positions)[None],
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
        max_seqlen=int(positions.max()) + 1,
        logit_positions=_joined(logit_positions, memory.words(count)),
        targets=_joined([s.trained(s.response_ids) for s in sequences], memory.words(count)),
        lengths=torch.from_numpy(trained),
        advantage=_joined([advantages.repeat(trained)], memory.floats(count)),
        rollout_logprob=_joined(
            [s.trained(s.rollout_logprobs) for s in sequences], memory.floats(count)
        ),
        old_logprob=_known("old_logprobs", sequences, memory),
        old_entropy=_known("old_entropies", sequences, memory),
        totals=totals,
        num_tokens=sum(sequence.num_tokens for sequence in sequences),
        prefix_groups=tuple(prefix_groups) if shared else None,
        logged_sample=tuple(sequence.logged_sample for sequence in sequences),
        routed_experts=_routed_experts(groups, boundaries, len(tokens)),
    )


def _joined(arrays: list[np.ndarray], out: np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays, out=out) if arrays else out)


def _routed_experts(groups: list[PrefixGroup], boundaries: list[int], rows: int) -> Tensor | None:
    """``MicroBatch.routed_experts`` of groups that start at ``boundaries``.

    A shared prompt gets the experts of its first response.
    """
    experts = [sequence.routed_experts for group in groups for sequence in group]
    given = [each for each in experts if each is not None]
    if not given:
        return None
    if len(given) < len(experts):
        raise ValueError(
            "pack: expected routed_experts of all sequences or of none, "
            f"got those of {len(given)} of {len(experts)}"
        )
    found = torch.full((rows, *given[0].shape[1:]), -1, dtype=torch.int16)
    chosen = iter(given)
    for group, start in zip(groups, boundaries, strict=False):
        known = 0
        for sequence in group:
            part = torch.from_numpy(next(chosen)[known:].astype(np.int16))
            found[start : start + len(part)] = part
            start, known = start + len(part), len(sequence.prompt_ids) - 1
    return found


def _known(name: str, sequences: list[TrainSequence], memory: _Memory) -> Tensor | None:
    """The values of the trained tokens, if every sequence has them."""
    if not sequences or any(getattr(sequence, name) is None for sequence in sequences):
        return None
    values = [s.trained(getattr(s, name)) for s in sequences]
    return _joined(values, memory.floats(sum(s.num_trained for s in sequences)))


def _in_rows(batch: MicroBatch) -> MicroBatch:
    """Turn a packed micro-batch of equally long sequences into ``[sequences, length]``."""
    assert batch.cu_seqlens is not None
    rows = len(batch.cu_seqlens) - 1
    length, experts = batch.tokens.size(1) // rows, batch.routed_experts
    if experts is not None:
        experts = experts.unflatten(0, (rows, length)).transpose(0, 1).flatten(0, 1)
    return replace(
        batch,
        tokens=batch.tokens.view(rows, length),
        position_ids=batch.position_ids.view(rows, length),
        # The model's hidden states are [length, rows, hidden].
        logit_positions=batch.logit_positions % length * rows + batch.logit_positions // length,
        routed_experts=experts,
        cu_seqlens=None,
    )
