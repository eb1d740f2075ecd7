"""A progress bar for each phase of a step, and the seconds each took. Only rank 0 draws; all ranks measure."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

OnProgress = Callable[[int, int], None]


class Phases:
    """Times named phases and shows a bar for the running one on a terminal (standard error).

    Args:
        draw: whether this rank draws; without a terminal nothing is drawn.
    """

    def __init__(self, draw: bool) -> None:
        self._draw = draw and sys.stderr.isatty()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, step: int, steps: int) -> Iterator[OnProgress]:
        """Run one phase; yields ``on_progress(finished, total)``. Its seconds are added to ``seconds[name]``."""
        start = time.perf_counter()
        try:
            if self._draw:
                with self._bar(f"step {step}/{steps} {name}") as on_progress:
                    yield on_progress
            else:
                yield lambda finished, total: None
        finally:
            self.add({name: time.perf_counter() - start})

    def add(self, seconds: dict[str, float]) -> None:
        """Enter phases that were timed elsewhere."""
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        taken, self.seconds = self.seconds, {}
        return taken

    @staticmethod
    @contextmanager
    def _bar(label: str) -> Iterator[OnProgress]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(label, total=None)
            yield lambda finished, total: progress.update(task, completed=finished, total=total)
