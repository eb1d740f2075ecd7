"""Finds expected answers that no response can equal, when the rows are read."""

import logging

import pyarrow.compute as pc

from megatron_espo.config import Config
from megatron_espo.data.sources import REASONING_GYM, Rows
from megatron_espo.errors import InputError
from megatron_espo.rewards.answers import gold_text

# Certainly readable: short, with a digit and without LaTeX. The regular expressions are RE2's.
_USUAL = r"^(?s:.*####)?[^$`\\{}#]{0,30}[0-9][^$`\\{}#]{0,30}$"

logger = logging.getLogger(__name__)


def check_golds(rows: Rows, source: str, config: Config) -> None:
    """Log how many answers the math judge cannot read, with the first one.

    Does nothing if another judge scores the rows. Only answers with an unusual form are looked at
    one by one, so that millions of numbers take seconds.

    Raises:
        InputError: more than ``reward.max_failed`` of the rows have such an answer.
    """
    is_math = config.reward.function in ("auto", "math_verify")
    if not is_math or source.startswith(REASONING_GYM) or ":" in config.environment.name:
        return
    answers = rows.table["answer"]
    unusual = pc.indices_nonzero(pc.invert(pc.match_substring_regex(answers, _USUAL)))
    unreadable = [i for i in unusual.to_pylist() if gold_text(answers[i].as_py()) is None]
    if not unreadable:
        return
    first = rows[unreadable[0]]
    found = (
        f"answer: expected one that reward.function {config.reward.function} can compare, got "
        f"another in {len(unreadable):,} of {len(rows):,} rows; the first is {first.answer!r:.80}"
    )
    if len(unreadable) > config.reward.max_failed * len(rows):
        advice = "name the column of the final answers in data.columns, or use your own function"
        raise InputError(f"{first.where}: {found}; {advice}")
    logger.warning("%s: %s; their responses get no reward", first.where, found)
