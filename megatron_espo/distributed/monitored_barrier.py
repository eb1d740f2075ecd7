"""A barrier with a timeout that names the missing rank on every other rank."""

import contextlib
import re
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_ALARM_SECONDS = 5.0


class RankLostError(RuntimeError):
    """A rank ended or was late. The message names the rank and the barrier."""


class MonitoredBarrier:
    """``torch.distributed.monitored_barrier`` in which rank 0 reports a late rank to the others.

    torch's barrier names the late rank on rank 0 only.

    Args:
        timeout_s: how long rank 0 waits for another rank.
        main_timeout_s: how long the others wait for rank 0, which may itself wait for a rank.

    Collectives: the constructor makes two process groups of all ranks.
    """

    def __init__(self, timeout_s: float, main_timeout_s: float) -> None:
        self._rank, self._others = dist.get_rank(), range(1, dist.get_world_size())
        self._limit = timeout_s if self._rank == 0 else main_timeout_s
        # After a timeout gloo closes all connections of a group, so the alarm needs its own group.
        limit = timedelta(seconds=main_timeout_s)
        self._group, self._alarm = (dist.new_group(backend="gloo", timeout=limit) for _ in range(2))

    def wait(self, what: str) -> None:
        """Return once all ranks have called this.

        Raises:
            RankLostError: on each rank, if one of them is late.
        """
        try:
            # Ranks other than 0 wait for the group's timeout.
            dist.monitored_barrier(self._group, timedelta(seconds=self._limit))
        except RuntimeError as error:
            lost = self._agree(re.search(r"Rank (\d+) failed", str(error)))
            raise RankLostError(
                f"rank {lost} ended, or did not come within {self._limit:g} s, for {what}"
            ) from None

    def _agree(self, found: re.Match | None) -> int:
        """Return the lost rank that rank 0 has found; 0 if it does not answer."""
        lost = torch.tensor([int(found[1]) if found else 0])
        if self._rank == 0:
            here = [rank for rank in self._others if rank != lost]
            works: list[Any] = [dist.isend(lost, rank, self._alarm) for rank in here]
        else:
            works = [dist.irecv(lost, src=0, group=self._alarm)]
        deadline = time.monotonic() + _ALARM_SECONDS
        for work in works:
            with contextlib.suppress(RuntimeError):  # a timeout or a closed connection
                work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
        return int(lost)
