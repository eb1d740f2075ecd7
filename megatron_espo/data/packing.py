"""From rollouts to packed micro-batches, balanced over data-parallel ranks. Pure bookkeeping: zero collectives.

Every rank calls :func:`pack` with the same sequences and takes its own share, so all ranks agree without talking.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
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
    dealt = deal(sequences, data_parallel_size, share_prompts)
    shares = [_bins([[sequences[i] for i in tree] for tree in share], max_tokens, max_sequences, padded) for share in dealt]
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


def deal(sequences: Sequence[TrainSequence], ranks: int, share_prompts: bool = False) -> list[list[list[int]]]:
    """Numbers of the sequences of each of so many data-parallel ranks, those that share a prompt together.

    Longest first to the rank with the fewest tokens so far.
    """
    trees: dict[Any, list[int]] = {}
    for number, sequence in enumerate(sequences):
        trees.setdefault(tuple(sequence.prompt_ids) if share_prompts else number, []).append(number)
    costs = {tree[0]: _cost([sequences[i] for i in tree]) for tree in trees.values()}
    shares: list[list[list[int]]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for tree in sorted(trees.values(), key=lambda tree: costs[tree[0]], reverse=True):
        rank = load.index(min(load))
        shares[rank].append(tree)
        load[rank] += costs[tree[0]]
    return shares


def _bins(trees: list[Tree], max_tokens: int, max_sequences: int | None, padded: bool) -> list[list[Tree]]:
    """First fit; the trees come longest first."""
    bins: list[list[Tree]] = []
    for tree in trees:
        for part in bins:
            tokens = _cost(part[0]) * (len(part) + 1) if padded else sum(map(_cost, part)) + _cost(tree)
            fits = tokens <= max_tokens
            if fits and (max_sequences is None or sum(map(len, part)) + len(tree) <= max_sequences):
                part.append(tree)
                break
        else:
            bins.append([tree])
    return bins


def _lay_out(tree: Tree) -> tuple[list[int], list[int], list[int], tuple[int, ...]]:
    """Token ids, position ids, predicting positions and the lengths of trunk and branches of one tree.

    A lone sequence is all trunk. A shared prompt is the trunk without its last token, which starts every branch, so that each response
    token is predicted from a position of its own; a branch needs no last response token, which predicts nothing.
    """
    prompt = list(tree[0].prompt_ids)
    if len(tree) == 1:
        tokens = prompt + list(tree[0].response_ids)
        # The hidden state one position earlier predicts a token.
        return tokens, list(range(len(tokens))), list(range(len(prompt) - 1, len(tokens) - 1)), (len(tokens),)
    trunk = len(prompt) - 1
    tokens, positions, lengths = prompt[:-1], list(range(trunk)), [trunk]
    for sequence in tree:
        tokens += [prompt[-1], *sequence.response_ids[:-1]]
        positions += range(trunk, trunk + len(sequence.response_ids))
        lengths.append(len(sequence.response_ids))
    return tokens, positions, list(range(trunk, len(tokens))), tuple(lengths)


def _micro_batch(
    trees: list[Tree], totals: BatchTotals, shape: tuple[int, int], align: int, padded: bool
) -> MicroBatch:
    """Lay out trees, each padded to a multiple of ``align`` (to a whole row if ``padded``), all together to ``shape``."""
    rows, length = shape
    tokens: list[int] = []
    positions: list[int] = []
    predict: list[int] = []
    branches: list[tuple[int, ...]] = []
    borders = [0]
    for tree in trees:
        tree_tokens, tree_positions, tree_predict, lengths = _lay_out(tree)
        predict += [len(tokens) + position for position in tree_predict]
        # Padding after a sequence's end: no response token attends to it.
        padding = -len(tree_tokens) % (length if padded else align)
        tokens += tree_tokens + [0] * padding
        positions += tree_positions + list(range(len(tree_tokens), len(tree_tokens) + padding))
        branches.append(lengths if not padding else (len(tree_tokens) + padding,))
        borders.append(len(tokens))
    # The rest is sequences of their own, short ones, whose attention costs little.
    filler = length if padded else _round_up(64, align)
    while rest := rows * length - len(tokens):
        filled = min(filler, rest)
        tokens += [0] * filled
        positions += range(filled)
        branches.append((filled,))
        borders.append(len(tokens))
    sequences = [sequence for tree in trees for sequence in tree]
    advantage = [s.advantage for s in sequences for _ in s.response_ids]
    return MicroBatch(
        tokens=torch.tensor([tokens]),
        position_ids=torch.tensor([positions]),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        max_seqlen=max(positions) + 1,
        predict=torch.tensor(predict, dtype=torch.long),
        targets=torch.tensor([t for s in sequences for t in s.response_ids], dtype=torch.long),
        lengths=torch.tensor([len(s.response_ids) for s in sequences], dtype=torch.long),
        advantage=torch.tensor(advantage, dtype=torch.float32),
        rollout_logprob=torch.tensor([p for s in sequences for p in s.rollout_logprobs], dtype=torch.float32),
        old_logprob=_known("old_logprobs", sequences),
        old_entropy=_known("old_entropies", sequences),
        totals=totals,
        num_tokens=sum(sequence.num_tokens for sequence in sequences),
        branches=tuple(branches) if any(len(lengths) > 1 for lengths in branches) else None,
        watched=tuple(sequence.watched for sequence in sequences),
        routed_experts=_routed_experts(trees, borders, len(tokens)),
    )


def _routed_experts(trees: list[Tree], borders: list[int], rows: int) -> Tensor | None:
    """``MicroBatch.routed_experts`` of trees that begin at ``borders``. The tokens of a shared prompt have those of its first response."""
    given = [sequence.routed_experts is not None for tree in trees for sequence in tree]
    if not any(given):
        return None
    if not all(given):
        raise ValueError(f"pack: expected routed_experts of all sequences or of none, got those of {sum(given)} of {len(given)}")
    found = torch.full((rows, *trees[0][0].routed_experts.shape[1:]), -1, dtype=torch.int16)
    for tree, start in zip(trees, borders, strict=False):
        known = 0
        for sequence in tree:
            part = torch.from_numpy(sequence.routed_experts[known:].astype(np.int16))
            found[start : start + len(part)] = part
            start, known = start + len(part), len(sequence.prompt_ids) - 1
    return found


def _known(name: str, sequences: list[TrainSequence]) -> Tensor | None:
    """One value for each response token, if every sequence has them."""
    values = [getattr(sequence, name) for sequence in sequences]
    if not values or any(value is None for value in values):
        return None
    return torch.tensor([v for value in values for v in value], dtype=torch.float32)


def _in_rows(batch: MicroBatch) -> MicroBatch:
    """A packed micro-batch of equally long sequences as ``[sequences, length]``."""
    rows = len(batch.cu_seqlens) - 1
    length, experts = batch.tokens.size(1) // rows, batch.routed_experts
    return replace(
        batch,
        tokens=batch.tokens.view(rows, length),
        position_ids=batch.position_ids.view(rows, length),
        # The model's hidden states are [length, rows, hidden].
        predict=batch.predict % length * rows + batch.predict // length,
        routed_experts=None if experts is None else experts.unflatten(0, (rows, length)).transpose(0, 1).flatten(0, 1),
        cu_seqlens=None,
    )
