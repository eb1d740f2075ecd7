"""Times, peak memory and collectives of a piece of code. torch only."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

# The profiler writes a line to stderr at each start and stop, on any lower level.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
ROOT = Path(__file__).resolve().parent.parent


def seconds(run: Callable[[], object]) -> float:
    """Wall seconds of ``run``, its work on the GPU included."""
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], object]) -> int:
    """Peak bytes of the tensors that ``run`` allocates, its result included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = run()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        kept = run()
    del kept
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


# Collective -> position of the sent tensor among its arguments.
_SENT = {"all_gather_single": 1, "all_gather_into_tensor": 1, "all_gather": 1}
_SENT |= {"reduce_scatter_single": 1, "reduce_scatter_tensor": 1, "all_reduce": 0, "broadcast": 0}


@contextmanager
def counted_collectives() -> Iterator[list[tuple[str, int]]]:
    """Record ``(kind, bytes this rank sends)`` of each ``torch.distributed`` collective."""
    calls: list[tuple[str, int]] = []
    originals = {name: getattr(dist, name) for name in _SENT if hasattr(dist, name)}

    def wrapped(name: str) -> Callable:
        def call(*args, **kwargs):
            sent = args[_SENT[name]]
            kind = name.removesuffix("_single").removesuffix("_into_tensor").removesuffix("_tensor")
            calls.append((kind, sent.numel() * sent.element_size()))
            return originals[name](*args, **kwargs)

        return call

    try:
        for name in originals:
            setattr(dist, name, wrapped(name))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


# Untimed preparation; timed run with its result.
Contestant = tuple[Callable[[], object], Callable[[object], object]]


def interleaved(
    contestants: dict[str, Contestant], rounds: int, clock: str = "wall"
) -> dict[str, list[float]]:
    """Seconds of every contestant in every round. Each round runs all of them in turn.

    ``clock="cpu"`` counts processor seconds of this process: for one thread on a shared machine.
    On a GPU the seconds are those between two events on the GPU: work that the host starts late
    counts, the host's own work does not.
    """
    now = time.perf_counter if clock == "wall" else time.process_time
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, (prepare, run) in contestants.items():
            prepared = prepare()
            if dist.is_initialized():
                dist.barrier()
            _synchronize()
            if torch.cuda.is_available():
                began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(5_000_000)  # a few milliseconds, in which the host runs ahead
                began.record()
                kept = run(prepared)
                ended.record()
                ended.synchronize()
                spent = began.elapsed_time(ended) / 1e3
            else:
                start = now()
                kept = run(prepared)
                spent = now() - start
            if turn > 0:  # the first warms up
                times[name].append(spent)
            del kept, prepared
    return times


def ratio(
    times: dict[str, list[float]], name: str, limit: Callable[[dict[str, float]], float]
) -> float:
    """Median over the rounds of ``times[name]`` divided by ``limit`` of that round's times."""
    rounds = [dict(zip(times, values, strict=True)) for values in zip(*times.values(), strict=True)]
    return median(r[name] / limit(r) for r in rounds)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
