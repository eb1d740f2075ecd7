"""Ranks that wait for each other for a limited time only, and say for whom."""

import time
from collections.abc import Collection
from datetime import timedelta

import torch
import torch.distributed as dist

_FAREWELL_SECONDS = 5.0


class RankLostError(RuntimeError):
    """A rank ended or did not come in time. The message names it, and what the others waited to do."""


class Lockstep:
    """Rank 0 finds out who is late and tells everybody. Small messages over gloo, beside whatever moves the data.

    Args:
        timeout_s: how long rank 0 waits for another rank.
        main_timeout_s: how long the others wait for rank 0, which may be waiting for somebody itself.

    Collectives: construction makes one process group of all ranks.
    """

    def __init__(self, timeout_s: float, main_timeout_s: float) -> None:
        self._rank, self._others = dist.get_rank(), range(1, dist.get_world_size())
        self._limit = timeout_s if self._rank == 0 else main_timeout_s
        # Where gloo gives up one message it closes all connections of a group: the bad news needs another one.
        limit = timedelta(seconds=max(timeout_s, main_timeout_s))
        self._group, self._alarm = (dist.new_group(backend="gloo", timeout=limit) for _ in range(2))

    def meet(self, what: str, ranks: Collection[int] | None = None) -> None:
        """Wait until rank 0 and ``ranks`` (without 0; default: all) have called this.

        Raises:
            RankLostError: on each of these ranks, one of them did not come in time.
        """
        ranks = self._others if ranks is None else ranks
        if self._rank == 0:
            self._wait([(rank, _receive(rank, self._group)[1]) for rank in ranks], what)
            self._wait([(rank, _send(rank, self._group)) for rank in ranks], what)
        elif self._rank in ranks:
            self._wait([(0, _send(0, self._group))], what)
            self._wait([(0, _receive(0, self._group)[1])], what)

    def _wait(self, works: list[tuple[int, dist.Work]], what: str) -> None:
        """Until the messages are exchanged; rank 0 tells the others whose was not."""
        missing = _late(works, self._limit)
        if not missing:
            return
        lost = missing[0]
        if self._rank == 0:
            here = [rank for rank in self._others if rank not in missing]
            _late([(rank, _send(rank, self._alarm, lost)) for rank in here], _FAREWELL_SECONDS)
        else:
            message, work = _receive(0, self._alarm)
            lost = lost if _late([(0, work)], _FAREWELL_SECONDS) else int(message)
        raise RankLostError(f"rank {lost} ended, or did not come within {self._limit:g} s, for {what}")


def _send(to: int, group: dist.ProcessGroup, lost: int = 0) -> dist.Work:
    return dist.isend(torch.tensor([lost]), dst=to, group=group)


def _receive(source: int, group: dist.ProcessGroup) -> tuple[torch.Tensor, dist.Work]:
    message = torch.zeros(1, dtype=torch.int64)
    return message, dist.irecv(message, src=source, group=group)


def _late(works: list[tuple[int, dist.Work]], seconds: float) -> list[int]:
    """The ranks whose message was not exchanged within ``seconds``."""
    deadline, late = time.monotonic() + seconds, []
    for rank, work in works:
        try:
            work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
        except RuntimeError:  # too late, or the connection is gone
            late.append(rank)
    return late
