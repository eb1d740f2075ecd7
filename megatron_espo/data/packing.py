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
    batches = [_micro_batch(*each, totals, spec) for each in zip(bins, shapes, strict=True)]
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


def _within_limits(group: PrefixGroup, spec: PackingSpec) -> list[PrefixGroup]:
    """Cut ``group`` where it would exceed a micro-batch. Each part has a copy of the prompt."""
    parts: list[PrefixGroup] = [[]]
    for sequence in group:
        longer = [*parts[-1], sequence]
        too_many = spec.max_sequences is not None and len(longer) > spec.max_sequences
        if parts[-1] and (too_many or _cost(longer) > spec.max_tokens):
            parts.append([sequence])
        else:
            parts[-1] = longer
    return parts


def _bins(groups: list[PrefixGroup], spec: PackingSpec) -> list[list[PrefixGroup]]:
    """First fit, longest group first, so that the first group of a padded micro-batch is its
    longest row. With ``uniform`` every row is as long as the longest of all.
    """
    parts = [part for group in groups for part in _within_limits(group, spec)]
    parts.sort(key=_cost, reverse=True)
    bins: list[list[PrefixGroup]] = []
    # Of each bin: tokens that still fit, tokens of a row, sequences.
    room, longest, count = np.zeros((3, len(parts)), np.int64)
    for group in parts:
        cost, used = _cost(group), len(bins)
        fits = room[:used] >= (longest[:used] if spec.padded else cost)
        if spec.max_sequences is not None:
            fits &= count[:used] + len(group) <= spec.max_sequences
        number = int(fits.argmax()) if used else 0
        if not used or not fits[number]:
            number = used
            bins.append([])
            room[number] = spec.max_tokens
            longest[number] = longest[0] if used and spec.uniform else cost
        bins[number].append(group)
        count[number] += len(group)
        room[number] -= longest[number] if spec.padded else cost
    return bins


def _micro_batch(
    groups: list[PrefixGroup], shape: tuple[int, int], totals: BatchTotals, spec: PackingSpec
) -> MicroBatch:
    """Lay groups out one after the other and pad them, each one and all together, to the shape
    (rows, length) of the micro-batch.

    A lone sequence is all prefix. A shared prefix is the prompt without its last token. That token
    starts every suffix, so that each response token is predicted from a position of its own. A
    suffix omits the last response token, which predicts nothing.
    """
    multiple = shape[1] if spec.padded else spec.sequence_multiple
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    logit_positions: list[np.ndarray] = []
    boundaries = [0]
    prefix_groups: list[tuple[int, ...]] = []
    for group in groups:
        prompt, start = group[0].prompt_ids, boundaries[-1]
        prefix = len(prompt) - 1
        tokens.append(prompt[:-1])
        positions.append(np.arange(prefix))
        lengths, end = [prefix], start + prefix
        for sequence in group:
            response = sequence.response_ids if len(group) == 1 else sequence.response_ids[:-1]
            length = 1 + len(response)
            tokens += prompt[-1:], response
            positions.append(np.arange(prefix, prefix + length))
            # The hidden state one position earlier predicts a token.
            predicting = np.arange(end, end + len(sequence.response_ids))
            logit_positions.append(sequence.trained(predicting))
            lengths.append(length)
            end += length
        # Padding comes after the end of a sequence: no response token attends to it.
        padding = (start - end) % multiple
        tokens.append(np.zeros(padding, np.int32))
        positions.append(np.arange(end - start, end - start + padding))
        boundaries.append(end + padding)
        prefix_groups.append(tuple(lengths) if len(group) > 1 else (end + padding - start,))
    # Short sequences fill the rest, because their attention costs little.
    filler = shape[1] if spec.padded else _round_up(64, multiple)
    while rest := shape[0] * shape[1] - boundaries[-1]:
        filled = min(filler, rest)
        tokens.append(np.zeros(filled, np.int32))
        positions.append(np.arange(filled))
        boundaries.append(boundaries[-1] + filled)
        prefix_groups.append((filled,))
    sequences = [sequence for group in groups for sequence in group]
    counts = torch.tensor([sequence.num_trained for sequence in sequences], dtype=torch.int64)
    advantages = torch.tensor([sequence.advantage for sequence in sequences], dtype=torch.float32)
    signs = torch.tensor([sequence.zero_variance for sequence in sequences], dtype=torch.int8)
    return MicroBatch(
        tokens=_join(tokens, np.int32)[None],
        position_ids=_join(positions, np.int32)[None],
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
        max_seqlen=max(first + max(rest, default=0) for first, *rest in prefix_groups),
        logit_positions=_join(logit_positions, np.int32),
        targets=_join([s.trained(s.response_ids) for s in sequences], np.int32),
        lengths=counts,
        advantage=advantages.repeat_interleave(counts),
        rollout_logprob=_join([s.trained(s.rollout_logprobs) for s in sequences], np.float32),
        old_logprob=_known("old_logprobs", sequences),
        old_entropy=_known("old_entropies", sequences),
        totals=totals,
        num_tokens=sum(sequence.num_tokens for sequence in sequences),
        prefix_groups=tuple(prefix_groups) if any(len(x) > 1 for x in prefix_groups) else None,
        logged_sample=tuple(sequence.logged_sample for sequence in sequences),
        routed_experts=_routed_experts(groups, boundaries),
        sampling_mask=_sampling_mask(sequences),
        zero_variance=signs if signs.any() else None,
    )


def _join(arrays: list[np.ndarray], dtype: type) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype), *arrays], dtype=dtype))


def _all_or_none(name: str, sequences: Sequence[TrainSequence]) -> list[Any]:
    """The attribute of every sequence; empty if none has it."""
    known = [value for s in sequences if (value := getattr(s, name)) is not None]
    if known and len(known) < len(sequences):
        got = f"those of {len(known)} of {len(sequences)}"
        raise ValueError(f"pack: expected {name} of all sequences or of none, got {got}")
    return known


def _known(name: str, sequences: Sequence[TrainSequence]) -> Tensor | None:
    """The values of the trained tokens, if they are known."""
    values = _all_or_none(name, sequences)
    trained = [s.trained(each) for s, each in zip(sequences, values, strict=False)]
    return _join(trained, np.float32) if trained else None


def _sampling_mask(sequences: Sequence[TrainSequence]) -> Tensor | None:
    masks = _all_or_none("sampling_mask", sequences)
    trained = [s.trained(mask) for s, mask in zip(sequences, masks, strict=False)]
    mask = SamplingMask.concatenate(trained)
    if mask is None:
        return None
    rows = np.arange(len(mask), dtype=np.int32).repeat(mask.counts)
    return torch.from_numpy(np.stack((rows, mask.ids)))


def _routed_experts(groups: list[PrefixGroup], boundaries: list[int]) -> Tensor | None:
    """``MicroBatch.routed_experts`` of groups that start at ``boundaries``.

    A shared prompt gets the experts of its first response.
    """
    given = _all_or_none("routed_experts", [sequence for group in groups for sequence in group])
    if not given:
        return None
    found = torch.full((boundaries[-1], *given[0].shape[1:]), -1, dtype=torch.int16)
    chosen = iter(given)
    for group, start in zip(groups, boundaries, strict=False):
        known = 0
        for sequence in group:
            part = torch.from_numpy(next(chosen)[known:].astype(np.int16))
            found[start : start + len(part)] = part
            start, known = start + len(part), len(sequence.prompt_ids) - 1
    return found


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
