"""Profiles of single steps: a torch profiler trace and a CUDA memory snapshot of each rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_espo.config import Run

_MOST_MEMORY_EVENTS = 100_000


@contextmanager
def profiled(run: Run, role: str, step: int) -> Iterator[None]:
    """Profile the block on this rank if ``step`` is one of ``run.profile_steps``.

    Writes ``profile/step_000010_<role>.json.gz`` (open it in Perfetto or ``chrome://tracing``)
    and, on a GPU, ``..._memory.pickle`` (open it with torch's ``memory_viz`` page).

    Args:
        run: the ``run`` section.
        role: names the rank in file names, such as ``rank3_dp0_pp1_tp1``.
        step: counted from 1.
    """
    if step not in run.profile_steps:
        yield
        return
    path = Path(run.dir, "profile", f"step_{step:06d}_{role}")
    path.parent.mkdir(parents=True, exist_ok=True)
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.memory._record_memory_history(max_entries=_MOST_MEMORY_EVENTS)
    with torch.profiler.profile() as profile:
        yield
    profile.export_chrome_trace(f"{path}.json.gz")
    if has_cuda:
        torch.cuda.memory._dump_snapshot(f"{path}_memory.pickle")
        torch.cuda.memory._record_memory_history(enabled=None)
