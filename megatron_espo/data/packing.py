"""Packs rollouts into micro-batches, balanced over data-parallel ranks. Zero collectives.

Every rank calls :func:`pack` with the same sequences and takes its own share, so all ranks agree without communication.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from megatron_espo.data.batches import BatchTotals, MicroBatch, TrainSequence
from megatron_espo.data.context_parallel import slice_micro_batch


def batch_totals(sequences: Sequence[TrainSequence], *, num_responses: int, num_response_tokens: int) -> BatchTotals:
    """Totals of an optimizer step of which ``sequences`` are the part that needs a gradient."""
    return BatchTotals(num_responses, num_response_tokens, max(1, sum(s.num_tokens for s in sequences)))


# Sequences that are laid out together: one, or several that share their prompt.
Tree = list[TrainSequence]


def pack(
    sequences: Sequence[TrainSequence],
    totals: BatchTotals,
    *,
    data_parallel_rank: int,
    data_parallel_size: int,
    max_tokens: int,
    max_sequences: int | None = None,
    multiple_of: int = 1,
    count_multiple_of: int = 1,
    context_parallel_rank: int = 0,
    context_parallel_size: int = 1,
    share_prompts: bool = False,
    padded: bool = False,
    uniform: bool = False,
) -> list[MicroBatch]:
    """Cut ``sequences`` into micro-batches of at most ``max_tokens`` and return one data-parallel rank's share.

    Every rank gets as many micro-batches as any other (empty ones where it has fewer sequences), because collectives
    inside a micro-batch must meet. A single sequence longer than ``max_tokens`` has a micro-batch of its own.

    Args:
        sequences: the whole step's, the same on every rank.
        totals: of the whole step.
        data_parallel_rank, data_parallel_size: whose share, of how many.
        max_tokens: at most so many tokens (prompts included) in one micro-batch over all context-parallel ranks; padding counts in
            padded micro-batches only.
        max_sequences: at most so many sequences in one micro-batch.
        multiple_of: each rank's length is padded to a multiple (sequence parallelism shards it over tensor-parallel ranks).
        count_multiple_of: so many micro-batches, or a multiple of it (the interleaved schedule wants one of the pipeline's size).
        context_parallel_rank, context_parallel_size: which slice of every sequence, of how many.
        share_prompts: put responses to the same prompt into one tree whose prompt goes through the model once. The gradient is the
            same; it needs :class:`megatron_espo.mcore.attention.PackedDotProductAttention`, and neither context parallelism nor padding.
        padded: one row for each sequence, as long as the longest, for attention that cannot take packed sequences.
        uniform: pad all micro-batches of this rank to one shape, so that pipeline stages need not tell each other how much comes.

    Raises:
        ValueError: shared prompts together with context parallelism or padding.
    """
    if share_prompts and (padded or context_parallel_size > 1):
        raise ValueError("share_prompts: expected false with context_parallel_size > 1 or padded micro-batches, got true")
    per_rank = shard_by_tokens(sequences, data_parallel_size, share_prompts)
    trees = [[[sequences[i] for i in tree] for tree in share] for share in per_rank]
    shares = [_bins(share, max_tokens, max_sequences, padded) for share in trees]
    count = max(1, *(len(share) for share in shares))
    count += -count % count_multiple_of
    mine = shares[data_parallel_rank]
    parts = mine + [[]] * (count - len(mine))
    align, unit = _multiples(multiple_of, context_parallel_size)
    shapes = _shapes(parts, align, unit, padded)
    if uniform:
        shapes = [tuple(map(max, zip(*shapes, strict=True)))] * count
    batches = [_micro_batch(part, totals, shape, align, padded) for part, shape in zip(parts, shapes, strict=True)]
    if context_parallel_size > 1:
        batches = [slice_micro_batch(batch, context_parallel_rank, context_parallel_size) for batch in batches]
    return [_in_rows(batch) for batch in batches] if padded else batches


def _multiples(multiple_of: int, context_parallel_size: int) -> tuple[int, int]:
    """What the length of a sequence and of a whole packed micro-batch must divide by, before the context-parallel cut."""
    if context_parallel_size == 1:
        return 1, multiple_of
    return 2 * context_parallel_size, context_parallel_size * math.lcm(2, multiple_of)


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _shapes(parts: list[list[Tree]], align: int, unit: int, padded: bool) -> list[tuple[int, int]]:
    """``(rows, length)`` of each micro-batch; one row if they are packed."""
    if padded:
        return [(max(1, len(part)), _round_up(max(map(_cost, part), default=1), unit)) for part in parts]
    return [(1, _round_up(max(1, sum(_round_up(_cost(tree), align) for tree in part)), unit)) for part in parts]


def _cost(tree: Tree) -> int:
    """Tokens that the tree puts through the model."""
    return len(tree[0].prompt_ids) + sum(len(sequence.response_ids) for sequence in tree)


def shard_by_tokens(sequences: Sequence[TrainSequence], ranks: int, share_prompts: bool = False) -> list[list[list[int]]]:
    """Numbers of the sequences of each of so many data-parallel ranks, those that share a prompt together.

    Longest first to the rank with the fewest tokens so far.
    """
    trees: dict[Any, list[int]] = {}
    for number, sequence in enumerate(sequences):
        trees.setdefault(sequence.prompt_ids.tobytes() if share_prompts else number, []).append(number)
    costs = {tree[0]: _cost([sequences[i] for i in tree]) for tree in trees.values()}
    shares: list[list[list[int]]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for tree in sorted(trees.values(), key=lambda tree: costs[tree[0]], reverse=True):
        rank = load.index(min(load))
        shares[rank].append(tree)
        load[rank] += costs[tree[0]]
    return shares


def _bins(trees: list[Tree], max_tokens: int, max_sequences: int | None, padded: bool) -> list[list[Tree]]:
    """First fit. The trees come longest first, so the first tree of a padded micro-batch is its longest row."""
    bins: list[list[Tree]] = []
    # Of each bin: tokens, sequences, tokens of its first tree. Rows after the last bin are 0.
    load, count, longest = np.zeros((3, len(trees)), np.int64)
    for tree in trees:
        cost = _cost(tree)
        opened = slice(len(bins))
        tokens = longest[opened] * (count[opened] + 1) if padded else load[opened] + cost
        fits = tokens <= max_tokens
        if max_sequences is not None:
            fits &= count[opened] + len(tree) <= max_sequences
        number = int(fits.argmax()) if fits.any() else len(bins)
        if number == len(bins):
            bins.append([])
            longest[number] = cost
        bins[number].append(tree)
        load[number] += cost
        count[number] += len(tree)
    return bins


def _lay_out(
    tree: Tree, tokens: np.ndarray, positions: np.ndarray, index: np.ndarray, start: int
) -> tuple[list[np.ndarray], tuple[int, ...]]:
    """Write token ids and position ids of one tree, from ``start`` on.

    A lone sequence is all prefix. A shared prompt is the prefix without its last token. That token starts every suffix, so that each
    response token is predicted from a position of its own. A suffix needs no last response token, which predicts nothing.

    Args:
        tree: one sequence, or several with the same prompt.
        tokens, positions: ``[tokens of the micro-batch]`` int64, filled here.
        index: ``[tokens of the micro-batch]`` int64, 0, 1, 2, ...
        start: first place of the tree.

    Returns:
        The places that predict the trained tokens, by sequence, and the lengths of the prefix and the suffixes.
    """
    prompt = tree[0].prompt_ids
    if len(tree) == 1:
        first = start + len(prompt)
        end = first + len(tree[0].response_ids)
        tokens[start:first], tokens[first:end] = prompt, tree[0].response_ids
        positions[start:end] = index[: end - start]
        # The hidden state one position earlier predicts a token.
        return [tree[0].trained(index[first - 1 : end - 1])], (end - start,)
    prefix = len(prompt) - 1
    first = start + prefix
    tokens[start:first], positions[start:first] = prompt[:-1], index[:prefix]
    logit_positions, lengths = [], [prefix]
    for sequence in tree:
        length = len(sequence.response_ids)
        end = first + length
        tokens[first], tokens[first + 1 : end] = prompt[-1], sequence.response_ids[:-1]
        positions[first:end] = index[prefix : prefix + length]
        logit_positions.append(sequence.trained(index[first:end]))
        lengths.append(length)
        first = end
    return logit_positions, tuple(lengths)


def _micro_batch(
    trees: list[Tree], totals: BatchTotals, shape: tuple[int, int], align: int, padded: bool
) -> MicroBatch:
    """Lay out trees, each padded to a multiple of ``align`` (to a whole row if ``padded``), all together to ``shape``."""
    rows, length = shape
    tokens = np.zeros(rows * length, np.int64)
    positions = np.empty(rows * length, np.int64)
    index = np.arange(rows * length)
    logit_positions: list[np.ndarray] = []
    branches: list[tuple[int, ...]] = []
    boundaries = [0]
    for tree in trees:
        start = boundaries[-1]
        places, lengths = _lay_out(tree, tokens, positions, index, start)
        logit_positions += places
        end = start + sum(lengths)
        # Padding lies after a sequence's end: no response token attends to it.
        padding = (start - end) % (length if padded else align)
        positions[end : end + padding] = index[end - start : end - start + padding]
        branches.append(lengths if not padding else (end - start + padding,))
        boundaries.append(end + padding)
    # The rest is short sequences of their own, whose attention costs little.
    filler = length if padded else _round_up(64, align)
    while rest := rows * length - boundaries[-1]:
        filled = min(filler, rest)
        positions[boundaries[-1] : boundaries[-1] + filled] = index[:filled]
        branches.append((filled,))
        boundaries.append(boundaries[-1] + filled)
    sequences = [sequence for tree in trees for sequence in tree]
    lengths = np.array([sequence.num_trained for sequence in sequences], np.int64)
    advantages = np.array([sequence.advantage for sequence in sequences], np.float32)
    return MicroBatch(
        tokens=torch.from_numpy(tokens)[None],
        position_ids=torch.from_numpy(positions)[None],
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
        max_seqlen=int(positions.max()) + 1,
        logit_positions=_joined(logit_positions, np.int64),
        targets=_joined([s.trained(s.response_ids) for s in sequences], np.int64),
        lengths=torch.from_numpy(lengths),
        advantage=torch.from_numpy(np.repeat(advantages, lengths)),
        rollout_logprob=_joined([s.trained(s.rollout_logprobs) for s in sequences], np.float32),
        old_logprob=_known("old_logprobs", sequences),
        old_entropy=_known("old_entropies", sequences),
        totals=totals,
        num_tokens=sum(sequence.num_tokens for sequence in sequences),
        branches=tuple(branches) if any(len(lengths) > 1 for lengths in branches) else None,
        watched=tuple(sequence.watched for sequence in sequences),
        routed_experts=_routed_experts(trees, boundaries, len(tokens)),
    )


def _joined(arrays: list[np.ndarray], dtype: DTypeLike) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays, dtype=dtype) if arrays else np.empty(0, dtype))


def _routed_experts(trees: list[Tree], boundaries: list[int], rows: int) -> Tensor | None:
    """``MicroBatch.routed_experts`` of trees that begin at ``boundaries``. The tokens of a shared prompt have those of its first response."""
    given = [sequence.routed_experts is not None for tree in trees for sequence in tree]
    if not any(given):
        return None
    if not all(given):
        raise ValueError(f"pack: expected routed_experts of all sequences or of none, got those of {sum(given)} of {len(given)}")
    found = torch.full((rows, *trees[0][0].routed_experts.shape[1:]), -1, dtype=torch.int16)
    for tree, start in zip(trees, boundaries, strict=False):
        known = 0
        for sequence in tree:
            part = torch.from_numpy(sequence.routed_experts[known:].astype(np.int16))
            found[start : start + len(part)] = part
            start, known = start + len(part), len(sequence.prompt_ids) - 1
    return found


def _known(name: str, sequences: list[TrainSequence]) -> Tensor | None:
    """One value for each trained token, if every sequence has them."""
    values = [getattr(sequence, name) for sequence in sequences]
    if not values or any(value is None for value in values):
        return None
    return _joined([s.trained(value) for s, value in zip(sequences, values, strict=True)], np.float32)


def _in_rows(batch: MicroBatch) -> MicroBatch:
    """A packed micro-batch of equally long sequences as ``[sequences, length]``."""
    rows = len(batch.cu_seqlens) - 1
    length, experts = batch.tokens.size(1) // rows, batch.routed_experts
    return replace(
        batch,
        tokens=batch.tokens.view(rows, length),
        position_ids=batch.position_ids.view(rows, length),
        # The model's hidden states are [length, rows, hidden].
        logit_positions=batch.logit_positions % length * rows + batch.logit_positions // length,
        routed_experts=None if experts is None else experts.unflatten(0, (rows, length)).transpose(0, 1).flatten(0, 1),
        cu_seqlens=None,
    )
