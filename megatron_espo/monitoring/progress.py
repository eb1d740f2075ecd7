"""Times the phases of a step on every rank, and shows a progress bar on rank 0."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from megatron_espo.distributed.watchdog import BETWEEN

OnProgress = Callable[[int, int], None]


class Phases:
    """Times named phases and shows a bar for the running one on a terminal (standard error).

    Args:
        draw: whether this rank shows the bar; without a terminal it never does.
        heartbeat: called on every progress, and with the phase's name and the step at its start and
            end (``Watchdog.heartbeat``).
    """

    def __init__(self, draw: bool, heartbeat: Callable[..., None] = lambda *_: None) -> None:
        self._draw, self._heartbeat = draw, heartbeat
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(
        self, name: str, step: int, steps: int, check: Callable[[], None] = lambda: None
    ) -> Iterator[OnProgress]:
        """Time a phase and add its seconds to ``seconds[name]``.

        Yields ``on_progress(finished, total)``, which calls ``check`` first; an exception of
        ``check`` ends the phase.
        """
        start = time.perf_counter()
        self._heartbeat(name, step)
        try:
            # None: a bar only on a terminal.
            hidden = None if self._draw else True
            with tqdm(desc=f"step {step}/{steps} {name}", disable=hidden, leave=False) as bar:

                def on_progress(finished: int, total: int) -> None:
                    check()
                    self._heartbeat()
                    bar.total = total
                    bar.update(finished - bar.n)

                yield on_progress
            self._heartbeat(BETWEEN, step)  # not after a failure: the error names the phase
        finally:
            taken = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + taken

    @contextmanager
    def counted_as(self, name: str) -> Iterator[None]:
        """Add the seconds of all phases inside to ``seconds[name]``."""
        before, self.seconds = self.seconds, {}
        try:
            yield
        finally:
            inside, self.seconds = sum(self.seconds.values()), before
            self.seconds[name] = before.get(name, 0.0) + inside

    def pop(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        taken, self.seconds = self.seconds, {}
        return taken
