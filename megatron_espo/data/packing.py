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
from megatron_espo.types import SamplingMask


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
    batches = _micro_batches(bins, shapes, totals, spec)
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
    # Of each bin: tokens that still fit, tokens of its first group, sequences.
    room, longest, count = np.zeros((3, len(groups)), np.int64)
    for group in groups:
        cost, used = _cost(group), len(bins)
        fits = room[:used] >= cost
        if spec.max_sequences is not None:
            fits &= count[:used] + len(group) <= spec.max_sequences
        number = int(fits.argmax()) if used else 0
        if not used or not fits[number]:
            number = used
            bins.append([])
            room[number], longest[number] = spec.max_tokens, cost
        bins[number].append(group)
        count[number] += len(group)
        room[number] -= longest[number] if spec.padded else cost
        if spec.padded and room[number] < longest[number]:
            room[number] = 0  # for the shorter rows too
    return bins


def _micro_batches(
    bins: list[list[PrefixGroup]],
    shapes: list[tuple[int, int]],
    totals: BatchTotals,
    spec: PackingSpec,
) -> list[MicroBatch]:
    """Lay groups out one after the other and pad them, each one and all together, to the shape
    (rows, length) of their micro-batch.

    The per-token tensors of all micro-batches are parts of a few large ones: one call fills each,
    and the operating system maps large blocks of memory in a fraction of the time.
    """
    sizes = [rows * length for rows, length in shapes]
    memory, index = np.empty((2, sum(sizes)), np.int32), np.arange(max(sizes), dtype=np.int32)
    parts = np.split(memory, np.cumsum(sizes)[:-1], axis=1)
    layouts = [_lay_out(*each, index, spec) for each in zip(bins, shapes, parts, strict=True)]
    by_batch = [[sequence for group in groups for sequence in group] for groups in bins]
    sequences = [sequence for each in by_batch for sequence in each]
    trained = np.array([sequence.num_trained for sequence in sequences], np.int64)
    advantages = np.array([sequence.advantage for sequence in sequences], np.float32)
    lengths = torch.from_numpy(trained).split([len(each) for each in by_batch])
    counts = [sum(sequence.num_trained for sequence in each) for each in by_batch]

    def split(arrays: list[np.ndarray], dtype: type) -> Sequence[Tensor]:
        return torch.from_numpy(np.concatenate([np.empty(0, dtype), *arrays])).split(counts)

    columns: dict[str, Any] = {
        "lengths": lengths,
        "logit_positions": split([x for layout in layouts for x in layout[2]], np.int32),
        "targets": split([s.trained(s.response_ids) for s in sequences], np.int32),
        "advantage": torch.from_numpy(advantages.repeat(trained)).split(counts),
        "rollout_logprob": split([s.trained(s.rollout_logprobs) for s in sequences], np.float32),
    }
    batches = []
    for i, (boundaries, prefix_groups, _) in enumerate(layouts):
        tokens, positions = torch.from_numpy(parts[i])[:, None]
        batch = MicroBatch(
            tokens=tokens,
            position_ids=positions,
            cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
            max_seqlen=max(first + max(rest, default=0) for first, *rest in prefix_groups),
            old_logprob=_known("old_logprobs", by_batch[i]),
            old_entropy=_known("old_entropies", by_batch[i]),
            totals=totals,
            num_tokens=sum(sequence.num_tokens for sequence in by_batch[i]),
            prefix_groups=tuple(prefix_groups) if any(len(x) > 1 for x in prefix_groups) else None,
            logged_sample=tuple(sequence.logged_sample for sequence in by_batch[i]),
            routed_experts=_routed_experts(bins[i], boundaries, tokens.size(1)),
            sampling_mask=_sampling_mask(by_batch[i]),
            zero_variance=_zero_variance(by_batch[i]),
            **{name: tensors[i] for name, tensors in columns.items()},
        )
        batches.append(batch)
    return batches


def _all_or_none(name: str, sequences: Sequence[TrainSequence]) -> list[Any]:
    """The attribute of every sequence; empty if none has it."""
    known = [value for s in sequences if (value := getattr(s, name)) is not None]
    if known and len(known) < len(sequences):
        got = f"those of {len(known)} of {len(sequences)}"
        raise ValueError(f"pack: expected {name} of all sequences or of none, got {got}")
    return known


def _sampling_mask(sequences: Sequence[TrainSequence]) -> Tensor | None:
    masks = _all_or_none("sampling_mask", sequences)
    trained = [s.trained(mask) for s, mask in zip(sequences, masks, strict=False)]
    mask = SamplingMask.concatenate(trained)
    if mask is None:
        return None
    rows = np.arange(len(mask), dtype=np.int32).repeat(mask.counts)
    return torch.from_numpy(np.stack((rows, mask.ids)))


def _zero_variance(sequences: Sequence[TrainSequence]) -> Tensor | None:
    signs = torch.tensor([sequence.zero_variance for sequence in sequences], dtype=torch.int8)
    return signs if signs.any() else None


Layout = tuple[list[int], list[tuple[int, ...]], list[np.ndarray]]


def _lay_out(
    groups: list[PrefixGroup],
    shape: tuple[int, int],
    memory: np.ndarray,
    index: np.ndarray,
    spec: PackingSpec,
) -> Layout:
    """Write token ids and position ids of a micro-batch.

    Args:
        groups: laid out one after the other.
        shape: ``(rows, length)`` of the micro-batch.
        memory: ``[2, rows * length]`` int32, token ids and position ids, filled here.
        index: int32, 0, 1, 2, ..., at least as long.
        spec: the layout.

    Returns:
        The boundaries, the lengths of the prefix and the suffixes of each group, and by sequence
            the positions that predict the trained tokens.
    """
    tokens, positions = memory
    multiple = shape[1] if spec.padded else spec.sequence_multiple
    # Short sequences fill the rest, because their attention costs little.
    filler = shape[1] if spec.padded else _round_up(64, multiple)
    boundaries = [0]
    prefix_groups: list[tuple[int, ...]] = []
    logit_positions: list[np.ndarray] = []
    for group in groups:
        start = boundaries[-1]
        places, lengths = _lay_out_group(group, tokens, positions, index, start)
        logit_positions += places
        end = start + sum(lengths)
        # Padding comes after the end of a sequence: no response token attends to it.
        padding = (start - end) % multiple
        tokens[end : end + padding] = 0
        positions[end : end + padding] = index[end - start : end - start + padding]
        prefix_groups.append(lengths if not padding else (end - start + padding,))
        boundaries.append(end + padding)
    while rest := len(tokens) - boundaries[-1]:
        filled = min(filler, rest)
        tokens[boundaries[-1] : boundaries[-1] + filled] = 0
        positions[boundaries[-1] : boundaries[-1] + filled] = index[:filled]
        prefix_groups.append((filled,))
        boundaries.append(boundaries[-1] + filled)
    return boundaries, prefix_groups, logit_positions


def _lay_out_group(
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


def _routed_experts(groups: list[PrefixGroup], boundaries: list[int], rows: int) -> Tensor | None:
    """``MicroBatch.routed_experts`` of groups that start at ``boundaries``.

    A shared prompt gets the experts of its first response.
    """
    given = _all_or_none("routed_experts", [sequence for group in groups for sequence in group])
    if not given:
        return None
    found = torch.full((rows, *given[0].shape[1:]), -1, dtype=torch.int16)
    chosen = iter(given)
    for group, start in zip(groups, boundaries, strict=False):
        known = 0
        for sequence in group:
            part = torch.from_numpy(next(chosen)[known:].astype(np.int16))
            found[start : start + len(part)] = part
            start, known = start + len(part), len(sequence.prompt_ids) - 1
    return found


def _known(name: str, sequences: list[TrainSequence]) -> Tensor | None:
    """The values of the trained tokens, if every sequence has them."""
    values = [(s, getattr(s, name)) for s in sequences]
    if not values or any(each is None for _, each in values):
        return None
    return torch.from_numpy(np.concatenate([s.trained(each) for s, each in values]))


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
