"""Asking a run to stop: a signal, a STOP file or the wall clock; every rank hears of it at the same place."""

import os
import signal
import time
from pathlib import Path

from megatron_espo.collectives import first_answer

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """Raised inside a phase on rank 0 when the run is to stop; nothing of the phase is kept."""


class StopRequest:
    """Whether this run has been asked to stop, and why.

    Sources: SIGTERM or SIGUSR1 to any rank, a file ``STOP`` in the run's folder, or the wall clock: ``max_seconds`` counted from the start of the
    *job* where Slurm tells it (``SLURM_JOB_START_TIME``), else of this process.

    Args:
        folder: the run's folder.
        max_seconds: ``None``: no limit.
    """

    def __init__(self, folder: Path, max_seconds: float | None) -> None:
        self._file = folder / "STOP"
        self._file.unlink(missing_ok=True)  # of the part of the run that it ended
        self._deadline = None if max_seconds is None else _job_start() + max_seconds
        self._signal: int | None = None
        for number in SIGNALS:
            signal.signal(number, self._remember)

    @property
    def reason(self) -> str | None:
        """Why to stop, or ``None``. This rank's own view."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self._file.exists():
            return "a STOP file"
        if self._deadline is not None and time.time() >= self._deadline:
            return "the wall-clock limit"
        return None

    def check(self) -> None:
        """Raise :class:`Stopped` if this rank has been asked."""
        if reason := self.reason:
            raise Stopped(reason)

    def agreed(self) -> str | None:
        """Some rank's reason, the same answer on all ranks. Collective as :func:`first_answer`."""
        return first_answer(self.reason)

    def _remember(self, number: int, frame) -> None:
        self._signal = number


def _job_start() -> float:
    return float(os.environ.get("SLURM_JOB_START_TIME") or time.time())
