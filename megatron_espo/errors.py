"""The error for mistakes that a user can correct; a log of failures that a run survives."""

import logging
from collections import Counter


class InputError(ValueError):
    """Bad configuration, data, model folder or placement.

    The message gives the key (with file and line, if known), what was expected, what was found, and
    what to do. The command line prints it without a traceback and exits with code 2.
    """


def log_first(logger: logging.Logger, counts: Counter[str], kind: str, message: str) -> None:
    """Count a failure. Log it if it is the first of its kind."""
    if not counts[kind]:
        logger.warning("%s; later failures of this kind are only counted (%s)", message, kind)
    counts[kind] += 1
