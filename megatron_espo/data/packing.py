"""From rollouts to packed micro-batches, balanced over data-parallel ranks. Pure bookkeeping: zero collectives.

Every rank calls :func:`pack` with the same sequences and takes its own share, so all ranks agree without talking.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_espo.algo import Annotation


@dataclass(frozen=True)
class TrainSequence:
    """One prompt and response with its advantage.

    Attributes:
        prompt_ids: at least one token id: the hidden state of the last one predicts the first response token.
        response_ids: at least one token id.
        rollout_logprobs: the engine's log-probs of ``response_ids`` (nats).
        advantage: of every token of the response.

    Raises:
        ValueError: an empty prompt or response, or log-probs that do not match the response.
    """

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    rollout_logprobs: Sequence[float]
    advantage: float

    def __post_init__(self) -> None:
        prompt, response, logprobs = len(self.prompt_ids), len(self.response_ids), len(self.rollout_logprobs)
        if not prompt or not response or logprobs != response:
            raise ValueError(
                "TrainSequence: expected a prompt and a response of at least one token, and a log-prob for each "
                f"response token, got {prompt} prompt tokens, {response} response tokens and {logprobs} log-probs"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class BatchTotals:
    """Sizes of one optimizer step's whole batch, over all data-parallel ranks; the denominators of the loss.

    ``num_responses`` and ``num_response_tokens`` count every response, also those that need no gradient; ``num_tokens``
    counts the tokens (prompts included) that really go through the model and is what Megatron's schedule divides
    gradients by.
    """

    num_responses: int
    num_response_tokens: int
    num_tokens: int


@dataclass(frozen=True)
class MicroBatch:
    """Whole sequences laid one after the other (THD), as the model and the loss take them.

    Attributes:
        tokens: ``[1, total]`` int64 token ids.
        position_ids: ``[1, total]`` int64, from 0 in each sequence.
        cu_seqlens: ``[sequences + 1]`` int32 borders.
        max_seqlen: tokens of the longest sequence.
        predict: ``[response_tokens]`` int64, packed position whose hidden state predicts each response token.
        targets: ``[response_tokens]`` int64, those response tokens.
        lengths: ``[responses]`` int64 response lengths.
        advantage, rollout_logprob: ``[response_tokens]`` float32.
        totals: sizes of the whole optimizer step.
        num_tokens: real tokens here (padding excluded).
        old_logprob, annotation: from the scoring pass; ``None`` when the step is the first on its rollouts, where the
            policy itself is the old policy.
    """

    tokens: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    predict: Tensor
    targets: Tensor
    lengths: Tensor
    advantage: Tensor
    rollout_logprob: Tensor
    totals: BatchTotals
    num_tokens: int
    old_logprob: Tensor | None = None
    annotation: Annotation | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch with its tensors on ``device``."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        if self.annotation is not None:
            fields = vars(self.annotation).items()
            moved["annotation"] = Annotation(**{name: value.to(device) for name, value in fields})
        return replace(self, **moved)


def batch_totals(sequences: Sequence[TrainSequence], *, num_responses: int, num_response_tokens: int) -> BatchTotals:
    """Totals of an optimizer step of which ``sequences`` are the part that needs a gradient."""
    return BatchTotals(num_responses, num_response_tokens, max(1, sum(s.num_tokens for s in sequences)))


def pack(
    sequences: Sequence[TrainSequence],
    totals: BatchTotals,
    *,
    data_parallel_rank: int,
    data_parallel_size: int,
    max_tokens: int,
    max_sequences: int | None = None,
    multiple_of: int = 1,
) -> list[MicroBatch]:
    """Cut ``sequences`` into micro-batches of at most ``max_tokens`` and return one data-parallel rank's share.

    Every rank gets as many micro-batches as any other (empty ones where it has fewer sequences), because collectives
    inside a micro-batch must meet. A single sequence longer than ``max_tokens`` has a micro-batch of its own.

    Args:
        sequences: the whole step's, the same on every rank.
        totals: of the whole step.
        data_parallel_rank, data_parallel_size: whose share, of how many.
        max_tokens: at most so many tokens (prompts included, padding not) in one micro-batch.
        max_sequences: at most so many sequences in one micro-batch.
        multiple_of: packed length is padded to a multiple (sequence parallelism shards it over tensor-parallel ranks).
    """
    shares = [_bins(share, max_tokens, max_sequences) for share in _balance(sequences, data_parallel_size)]
    count = max(1, *(len(share) for share in shares))
    mine = shares[data_parallel_rank]
    return [_micro_batch(part, totals, multiple_of) for part in mine + [[]] * (count - len(mine))]


def _balance(sequences: Sequence[TrainSequence], ranks: int) -> list[list[TrainSequence]]:
    """Longest first to the rank with the fewest tokens so far."""
    shares: list[list[TrainSequence]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for sequence in sorted(sequences, key=lambda s: -s.num_tokens):
        rank = load.index(min(load))
        shares[rank].append(sequence)
        load[rank] += sequence.num_tokens
    return shares


def _bins(sequences: list[TrainSequence], max_tokens: int, max_sequences: int | None) -> list[list[TrainSequence]]:
    """First fit; the sequences come longest first."""
    bins: list[list[TrainSequence]] = []
    for sequence in sequences:
        for part in bins:
            fits = sum(s.num_tokens for s in part) + sequence.num_tokens <= max_tokens
            if fits and (max_sequences is None or len(part) < max_sequences):
                part.append(sequence)
                break
        else:
            bins.append([sequence])
    return bins


def _micro_batch(sequences: list[TrainSequence], totals: BatchTotals, multiple_of: int) -> MicroBatch:
    tokens: list[int] = []
    positions: list[int] = []
    predict: list[int] = []
    borders = [0]
    for sequence in sequences:
        start = len(tokens)
        tokens += [*sequence.prompt_ids, *sequence.response_ids]
        positions += range(sequence.num_tokens)
        # The hidden state one position earlier predicts a token.
        predict += range(start + len(sequence.prompt_ids) - 1, len(tokens) - 1)
        borders.append(len(tokens))
    num_tokens = len(tokens)
    # Padding is a sequence of its own, which no response token attends to; an empty micro-batch is nothing but padding.
    padding = -num_tokens % multiple_of or (0 if tokens else multiple_of)
    if padding:
        tokens += [0] * padding
        positions += range(padding)
        borders.append(len(tokens))
    lengths = [len(s.response_ids) for s in sequences]
    advantage = [s.advantage for s in sequences for _ in s.response_ids]
    return MicroBatch(
        tokens=torch.tensor([tokens]),
        position_ids=torch.tensor([positions]),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        max_seqlen=max(end - start for start, end in zip(borders, borders[1:], strict=False)),
        predict=torch.tensor(predict, dtype=torch.long),
        targets=torch.tensor([t for s in sequences for t in s.response_ids], dtype=torch.long),
        lengths=torch.tensor(lengths, dtype=torch.long),
        advantage=torch.tensor(advantage, dtype=torch.float32),
        rollout_logprob=torch.tensor([p for s in sequences for p in s.rollout_logprobs], dtype=torch.float32),
        totals=totals,
        num_tokens=num_tokens,
    )
