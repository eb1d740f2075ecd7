"""Stop a run on a signal, a STOP file or a wall-clock limit."""

import os
import signal
import time
from pathlib import Path

from megatron_espo.distributed.collectives import first_not_none


class Stopped(Exception):
    """Raised on rank 0 inside a phase when the run must stop. The phase's results are dropped."""


class StopRequest:
    """Records whether this run must stop, and why.

    Sources: SIGTERM or SIGUSR1 to any rank; a file ``STOP`` in the run's folder; the wall clock.
    The wall clock counts from the start of the Slurm job (``SLURM_JOB_START_TIME``) if there is
    one, else from the start of this process.

    Args:
        folder: the run's folder. A ``STOP`` file of an earlier part of the run is removed.
        max_seconds: wall-clock limit; ``None``: no limit.
    """

    def __init__(self, folder: Path, max_seconds: float | None) -> None:
        self._file = folder / "STOP"
        self._file.unlink(missing_ok=True)
        start = float(os.environ.get("SLURM_JOB_START_TIME") or time.time())
        self._deadline = None if max_seconds is None else start + max_seconds
        self._signal: int | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    @property
    def reason(self) -> str | None:
        """Why this rank must stop, or ``None``."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self._file.exists():
            return "a STOP file"
        if self._deadline is not None and time.time() >= self._deadline:
            return "the wall-clock limit"
        return None

    def check(self) -> None:
        """Raise :class:`Stopped` if this rank must stop."""
        if reason := self.reason:
            raise Stopped(reason)

    def agreed(self) -> str | None:
        """Return the reason of the lowest rank that has one. Collective: :func:`first_not_none`."""
        return first_not_none(self.reason)

    def _remember(self, number: int, frame: object) -> None:
        self._signal = number
