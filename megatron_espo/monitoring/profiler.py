"""Profiles of single steps: a torch profiler trace and a CUDA memory snapshot of each rank."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_MOST_MEMORY_EVENTS = 100_000


class StepProfiler:
    """Profiles the chosen steps of a run on this rank.

    A profiled step writes ``profile/step_000010_<role>.json.gz`` (open it in Perfetto or
    ``chrome://tracing``) and, on a GPU, ``..._memory.pickle`` (open it with torch's
    ``memory_viz`` page).

    Args:
        folder: of the run.
        role: names the rank in file names, such as ``rank3_dp0_pp1_tp1``.
        steps: the steps to profile.
    """

    def __init__(self, folder: Path, role: str, steps: Collection[int]) -> None:
        self._folder, self._role, self._steps = folder / "profile", role, frozenset(steps)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Profile the block if ``number`` is one of the chosen steps."""
        if number not in self._steps:
            yield
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step_{number:06d}_{self._role}"
        has_cuda = torch.cuda.is_available()
        if has_cuda:
            torch.cuda.memory._record_memory_history(max_entries=_MOST_MEMORY_EVENTS)
        try:
            with torch.profiler.profile() as profile:
                yield
            profile.export_chrome_trace(f"{path}.json.gz")
            if has_cuda:
                torch.cuda.memory._dump_snapshot(f"{path}_memory.pickle")
        finally:
            if has_cuda:
                torch.cuda.memory._record_memory_history(enabled=None)
