"""How much memory the linear head takes."""

from dataclasses import dataclass

import torch

# Preferred working chunk: large enough for a fast matrix product, small next to the model.
_CHUNK_BYTES = 64 << 20
_CHUNK_ROWS = 256
# With 16 bits on a GPU, fewer rows read the weight too often.
_CHUNK_ROWS_16_BITS = 1536


@dataclass(frozen=True)
class HeadPlan:
    """Memory plan of one call of the linear head on one rank.

    Bytes count what grows with tokens times columns: logits, their gradient, float32 copies of
    either. Not counted, since no plan changes them: some forty bytes per token, the gathered hidden
    states, the gradients that are returned.

    Attributes:
        keep_logits: keep one buffer of logits for backward; otherwise backward computes them again,
            chunk by chunk.
        chunk_tokens: tokens of a working chunk.
        training_bytes: peak over forward and backward.
    """

    keep_logits: bool
    chunk_tokens: int
    training_bytes: int


def plan_head(
    tokens: int,
    width: int,
    *,
    dtype: torch.dtype,
    budget_bytes: int | None = None,
) -> HeadPlan:
    """Choose the memory mode and the chunk from a budget.

    Args:
        tokens: tokens to score in one call.
        width: columns of the vocabulary shard (vocab/tp, padding included).
        dtype: of the hidden states, and of the kept logits.
        budget_bytes: upper limit of :attr:`HeadPlan.training_bytes`; None keeps the logits whatever
            they take.

    Raises:
        ValueError: the budget does not hold a single row.
    """
    narrow = dtype.itemsize * width
    wide = 4 * width if dtype.itemsize < 4 else 0  # a float32 row beside kept logits
    row = narrow + wide  # a working row in recompute mode
    fewest = _CHUNK_ROWS_16_BITS if wide else _CHUNK_ROWS
    preferred = min(max(_CHUNK_BYTES // max(row, 1), fewest), max(tokens, 1))
    if budget_bytes is not None and budget_bytes < row:
        raise ValueError(
            f"the head needs {row} bytes for one token of {width} columns; "
            f"budget_bytes is {budget_bytes}"
        )
    keep, chunk = True, preferred
    if budget_bytes is not None:
        spare = budget_bytes - tokens * narrow
        if wide:
            chunk = min(preferred, max(spare, 0) // wide)
        keep = spare >= 0 and chunk >= min(_CHUNK_ROWS, preferred)
        if not keep:
            chunk = min(preferred, budget_bytes // row)
    training = tokens * narrow + chunk * wide if keep else chunk * row
    return HeadPlan(keep, chunk, training)
