"""How much memory the linear head takes."""

from dataclasses import dataclass

import torch

# Preferred working chunk: large enough for a fast matrix product, small next to the model.
_CHUNK_BYTES = 64 << 20
_CHUNK_ROWS = 256


@dataclass(frozen=True)
class HeadPlan:
    """Memory plan of one call of the linear head on one rank.

    Bytes count what grows with tokens times columns: logits, their gradient, float32 copies of
        either. Not counted,
    since no plan changes them: some forty bytes per token, the gathered hidden states, the
        gradients that are returned.

    Attributes:
        keep_logits: keep one buffer of logits for backward; otherwise backward computes them again,
            chunk by chunk.
        chunk_tokens: tokens of a working chunk.
        forward_bytes: peak of a forward pass without gradients (scoring).
        training_bytes: peak over forward and backward.
    """

    keep_logits: bool
    chunk_tokens: int
    forward_bytes: int
    training_bytes: int


def plan_head(
    tokens: int,
    width: int,
    *,
    dtype: torch.dtype,
    budget_bytes: int | None = None,
    float32_logits: bool = False,
    convert_gradient: bool = False,
) -> HeadPlan:
    """Choose the memory mode and the chunk from a budget.

    Args:
        tokens: tokens to score in one call.
        width: columns of the vocabulary shard (vocab/tp, padding included).
        dtype: of the hidden states, and of the kept logits.
        budget_bytes: upper limit of :attr:`HeadPlan.training_bytes`; None keeps the logits whatever
            they take.
        float32_logits: chunks of logits are float32 while the hidden states are narrower.
        convert_gradient: the weight's gradient product needs a float32 copy of each chunk (bfloat16
            on CPU).

    Raises:
        ValueError: the budget does not hold a single row.
    """
    narrow, wide = dtype.itemsize * width, 4 * width
    two_types = float32_logits and dtype.itemsize < 4
    kept_row = wide if two_types or convert_gradient else 0  # a working row beside kept logits
    row = narrow + kept_row  # a working row in recompute mode
    forward_row = wide if two_types else narrow
    preferred = min(max(_CHUNK_BYTES // max(row, 1), _CHUNK_ROWS), max(tokens, 1))
    if budget_bytes is not None and budget_bytes < row:
        raise ValueError(
            f"the head needs {row} bytes for one token of {width} columns; "
            f"budget_bytes is {budget_bytes}"
        )
    keep, chunk = True, preferred
    if budget_bytes is not None:
        spare = budget_bytes - tokens * narrow
        if kept_row:
            chunk = min(preferred, max(spare, 0) // kept_row)
        keep = spare >= 0 and chunk >= min(_CHUNK_ROWS, preferred)
        if not keep:
            chunk = min(preferred, budget_bytes // row)
    training = tokens * narrow + chunk * kept_row if keep else chunk * row
    return HeadPlan(keep, chunk, chunk * forward_row, training)
