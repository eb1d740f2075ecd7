"""Finds expected answers that no response can equal, when the rows are read."""

import logging

import pyarrow as pa
import pyarrow.compute as pc

from megatron_espo.config import Config
from megatron_espo.data.sources import REASONING_GYM, Rows
from megatron_espo.errors import InputError
from megatron_espo.rewards.answers import gold_text

logger = logging.getLogger(__name__)


def check_golds(rows: Rows, source: str, config: Config) -> None:
    """Log how many answers the math judge cannot read, with the first one.

    Does nothing if another judge scores the rows. Only answers with an unusual form are looked at
    one by one, so that millions of rows take seconds.

    Raises:
        InputError: more than ``reward.max_failed`` of the rows have such an answer.
    """
    judge = config.reward.weights.keys() & {"auto", "math_verify"}
    if not judge or source.startswith(REASONING_GYM) or ":" in config.environment.name:
        return
    unreadable = [
        index
        for index in pc.indices_nonzero(pc.invert(_usual(rows.table["answer"]))).to_pylist()
        if gold_text(rows.table["answer"][index].as_py()) is None
    ]
    if not unreadable:
        return
    first = rows[unreadable[0]]
    found = (
        f"answer: expected one that {min(judge)} can compare, got "
        f"another in {len(unreadable):,} of {len(rows):,} rows; the first is {first.answer!r:.80}"
    )
    if len(unreadable) > config.reward.max_failed * len(rows):
        advice = "name the column of the final answers in data.columns, or use your own function"
        raise InputError(f"{first.where}: {found}; {advice}")
    logger.warning("%s: %s; their responses get no reward", first.where, found)


def _usual(answers: pa.ChunkedArray) -> pa.ChunkedArray:
    """Which answers are certainly readable: short, with a digit or letter, braces in pairs."""
    answers = pc.replace_substring_regex(answers, r"(?s)^.*####", "")
    is_short = pc.match_substring_regex(answers, r"^[^$`]{0,59}$")
    # Commands such as \text{} and currency names may leave nothing.
    is_pure = pc.match_substring_regex(answers, r"[0-9]|^[A-Za-z]{4,}$")
    opened, closed = (pc.count_substring(answers, brace) for brace in "{}")
    return pc.and_(pc.and_(is_short, is_pure), pc.equal(opened, closed))
