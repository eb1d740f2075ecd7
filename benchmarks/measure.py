"""Peak memory, collectives and paired times of a piece of code. torch only."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes of tensors allocated by ``run`` that were alive at one time, its result included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = run()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = run()
    del kept
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


# By the position of the tensor that is sent; the names that this torch has.
_SENT = {"all_gather_single": 1, "all_gather_into_tensor": 1, "all_gather": 1}
_SENT |= {"reduce_scatter_single": 1, "reduce_scatter_tensor": 1, "all_reduce": 0, "broadcast": 0}


@contextmanager
def counted_collectives() -> Iterator[list[tuple[str, int]]]:
    """Record ``(kind, bytes this rank sends)`` of every collective called through ``torch.distributed``."""
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


# Untimed preparation, timed run of what it returned.
Contestant = tuple[Callable[[], object], Callable[[object], object]]


def interleaved(contestants: dict[str, Contestant], rounds: int, clock: str = "wall") -> dict[str, list[float]]:
    """Seconds of every contestant in every round; each round runs all of them, so that a busy machine slows all alike.

    ``clock="cpu"`` counts this process's processor seconds: for single-threaded runs on a machine shared with others.
    """
    now = time.perf_counter if clock == "wall" else time.process_time
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, (prepare, run) in contestants.items():
            prepared = prepare()
            if dist.is_initialized():
                dist.barrier()
            _synchronize()
            start = now()
            kept = run(prepared)
            _synchronize()
            if turn > 0:  # the first warms up
                times[name].append(now() - start)
            del kept, prepared
    return times


def ratio(times: dict[str, list[float]], name: str, limit: Callable[[dict[str, float]], float]) -> float:
    """Median over the rounds of ``times[name]`` divided by ``limit`` of that round's times."""
    rounds = [dict(zip(times, values, strict=True)) for values in zip(*times.values(), strict=True)]
    return statistics.median(r[name] / limit(r) for r in rounds)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
