"""Ranks that wait for a late rank."""

import time

import torch.distributed as dist

from megatron_espo.distributed.monitored_barrier import MonitoredBarrier, RankLostError


def lose(rank: int) -> list[tuple[str, float]]:
    """``rank`` sleeps; return the errors of the others and the seconds they took."""
    steps = MonitoredBarrier(2.0, 5.0)
    for _ in range(3):
        steps.wait("nothing yet")
    others = dist.new_group([r for r in range(3) if r != rank])
    dist.barrier()
    began = time.monotonic()
    if dist.get_rank() == rank:
        time.sleep(7)
        message = "asleep"
    else:
        try:
            steps.wait("the test")
            message = "no error"
        except RankLostError as error:
            message = str(error)
    answers = [None, None]
    if dist.get_rank() != rank:
        dist.all_gather_object(answers, (message, time.monotonic() - began), group=others)
    return answers
