"""How long a step takes and how much of the machine idles in it, simulated from response lengths. Standard library only."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count


@dataclass(frozen=True)
class Decoder:
    """The rollout side: ``engines`` alike, fed from one queue.

    Attributes:
        engines: how many.
        gpus: of one engine.
        slots: most sequences that an engine decodes at once.
        fixed_s, each_s: one token for each of n sequences takes ``fixed_s + n * each_s`` seconds.
    """

    engines: int
    gpus: int
    slots: int
    fixed_s: float
    each_s: float


@dataclass(frozen=True)
class Rollouts:
    """One batch of responses.

    Attributes:
        seconds: until the last of them, or the last that was waited for, is finished.
        idle_gpu_s: GPU-seconds until then of engines that had nothing to decode.
        unfinished: tokens that each of the others still lacks.
        finished: indices of the finished ones, in the order in which they finished.
    """

    seconds: float
    idle_gpu_s: float
    unfinished: dict[int, float]
    finished: list[int]


class _Engine:
    """Sequences end when the engine's token counter reaches their mark."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.clock, self.tokens, self.idle_since = decoder, 0.0, 0.0, 0.0
        self.marks: list[tuple[float, int]] = []

    def admit(self, index: int, length: float) -> None:
        heapq.heappush(self.marks, (self.tokens + length, index))

    def next_end(self) -> float:
        """The time at which the next of its sequences ends if none is admitted before."""
        return self.clock + (self.marks[0][0] - self.tokens) * self.token_s()

    def token_s(self) -> float:
        return self.decoder.fixed_s + len(self.marks) * self.decoder.each_s

    def advance(self, time: float) -> None:
        self.tokens += (time - self.clock) / self.token_s() if self.marks else 0.0
        self.clock = time


def simulate_rollouts(lengths: Sequence[float], decoder: Decoder, *, order: Sequence[int] | None = None, enough: int | None = None) -> Rollouts:
    """Decode responses of ``lengths`` tokens: free slots are filled in ``order``, always at the engine that has fewest sequences.

    Args:
        order: indices into ``lengths``; None: as they are.
        enough: stop when so many are finished; None: all.
    """
    waiting = list(range(len(lengths)) if order is None else order)[::-1]
    engines, finished, tie = [_Engine(decoder) for _ in range(decoder.engines)], [], count()
    while waiting and len(engines[0].marks) < decoder.slots:
        for engine in engines[: len(waiting)]:
            index = waiting.pop()
            engine.admit(index, lengths[index])
    events = [(engine.next_end(), next(tie), engine) for engine in engines if engine.marks]
    heapq.heapify(events)
    time = 0.0
    while events and len(finished) < (len(lengths) if enough is None else enough):
        time, _, engine = heapq.heappop(events)
        engine.advance(time)
        engine.tokens, index = heapq.heappop(engine.marks)  # exactly at the mark, whatever rounding says
        finished.append(index)
        if waiting:
            index = waiting.pop()
            engine.admit(index, lengths[index])
        if engine.marks:
            heapq.heappush(events, (engine.next_end(), next(tie), engine))
        else:
            engine.idle_since = time
    unfinished = {index: lengths[index] for index in waiting}
    for engine in engines:
        if engine.marks:
            engine.advance(time)
            unfinished |= {index: mark - engine.tokens for mark, index in engine.marks}
    idle = sum(time - engine.idle_since for engine in engines if not engine.marks)
    return Rollouts(time, idle * decoder.gpus, unfinished, finished)


@dataclass(frozen=True)
class Trainer:
    """The training side: ``gpus`` of them take ``seconds`` for a batch, of which each idles the share ``bubble``."""

    gpus: int
    seconds: float
    bubble: float


@dataclass(frozen=True)
class Step:
    """Wall-clock seconds of a step, and the share of all GPU-seconds in which a GPU had nothing to do."""

    seconds: float
    idle: float


def synchronous(rollouts: Rollouts, trainer: Trainer, sync_s: float) -> Step:
    """The same GPUs sample, then train, then exchange weights (which counts as work)."""
    seconds = rollouts.seconds + trainer.seconds + sync_s
    return Step(seconds, (rollouts.idle_gpu_s + trainer.bubble * trainer.seconds * trainer.gpus) / (seconds * trainer.gpus))


def one_step_off(rollouts: Rollouts, decoder: Decoder, trainer: Trainer, sync_s: float) -> Step:
    """Some GPUs sample the next batch while the others train this one; then both exchange weights."""
    work, engine_gpus = max(rollouts.seconds, trainer.seconds), decoder.engines * decoder.gpus
    idle = rollouts.idle_gpu_s + (work - rollouts.seconds) * engine_gpus
    idle += (work - trainer.seconds * (1 - trainer.bubble)) * trainer.gpus
    return Step(work + sync_s, idle / ((work + sync_s) * (engine_gpus + trainer.gpus)))
