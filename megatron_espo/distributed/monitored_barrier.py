"""A barrier with a timeout that names the missing rank on every other rank."""

import time
from collections.abc import Collection
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_ALARM_SECONDS = 5.0


class RankLostError(RuntimeError):
    """A rank ended or was late. The message names the rank and the barrier."""


class MonitoredBarrier:
    """Rank 0 detects late ranks and reports them to the others, over gloo.

    ``torch.distributed.monitored_barrier`` names the late rank on rank 0 only, and takes all ranks.

    Args:
        timeout_s: how long rank 0 waits for another rank.
        main_timeout_s: how long the others wait for rank 0, which may itself wait for a rank.

    Collectives: the constructor makes two process groups of all ranks.
    """

    def __init__(self, timeout_s: float, main_timeout_s: float) -> None:
        self._rank, self._others = dist.get_rank(), range(1, dist.get_world_size())
        self._limit = timeout_s if self._rank == 0 else main_timeout_s
        # After a timeout gloo closes all connections of a group, so the alarm needs its own group.
        limit = timedelta(seconds=max(timeout_s, main_timeout_s))
        self._group, self._alarm = (dist.new_group(backend="gloo", timeout=limit) for _ in range(2))

    def wait(self, what: str, ranks: Collection[int] | None = None) -> None:
        """Return once rank 0 and ``ranks`` (default: all; 0 is not listed) have called this.

        Raises:
            RankLostError: on each of these ranks, if one of them is late.
        """
        ranks = self._others if ranks is None else ranks
        if self._rank == 0:
            self._finish([(rank, _receive(rank, self._group)[1]) for rank in ranks], what)
            self._finish([(rank, _send(rank, self._group)) for rank in ranks], what)
        elif self._rank in ranks:
            self._finish([(0, _send(0, self._group))], what)
            self._finish([(0, _receive(0, self._group)[1])], what)

    def _finish(self, works: list[tuple[int, Any]], what: str) -> None:
        """Wait for the messages. On a timeout rank 0 sends the number of the late rank."""
        missing = _late(works, self._limit)
        if not missing:
            return
        lost = missing[0]
        if self._rank == 0:
            here = [rank for rank in self._others if rank not in missing]
            _late([(rank, _send(rank, self._alarm, lost)) for rank in here], _ALARM_SECONDS)
        else:
            message, work = _receive(0, self._alarm)
            lost = lost if _late([(0, work)], _ALARM_SECONDS) else int(message)
        raise RankLostError(
            f"rank {lost} ended, or did not come within {self._limit:g} s, for {what}"
        )


def _send(to: int, group: Any, lost: int = 0) -> Any:
    return dist.isend(torch.tensor([lost]), dst=to, group=group)


def _receive(source: int, group: Any) -> tuple[torch.Tensor, Any]:
    message = torch.zeros(1, dtype=torch.int64)
    return message, dist.irecv(message, src=source, group=group)


def _late(works: list[tuple[int, Any]], seconds: float) -> list[int]:
    """Return the ranks whose message did not complete within ``seconds``."""
    deadline, late = time.monotonic() + seconds, []
    for rank, work in works:
        try:
            work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
        except RuntimeError:  # a timeout or a closed connection
            late.append(rank)
    return late
