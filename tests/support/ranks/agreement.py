"""Flip one bit on one rank and return the errors. Runs on every rank."""

import time
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_espo.distributed.collectives import first_not_none, gather_objects, on_rank_0
from megatron_espo.megatron.consistency import RankMismatch, check_norms, check_weights
from tests.support.ranks.resume import make_actor, make_groups


def check(folder: str, cases: list[dict]) -> list[dict[str, str]]:
    """Return for each layout the errors without a flip, and with each flip on the last rank."""
    results = []
    for case in cases:
        actor, spec, place = make_actor(folder, "float32", case["sizes"])
        errors = {"nothing": _update(actor, spec, 1)}
        compare = actor._compare_ranks
        if place.rank == place.world_size - 1:
            actor._compare_ranks = lambda groups, batches, compare=compare: compare(
                groups, _with_flipped_token(batches)
            )
        errors["tokens"] = _update(actor, spec, 2)
        actor._compare_ranks = compare
        for name in case["weights"]:
            parameters = [
                p for chunk in actor.chunks for n, p in chunk.named_parameters() if n == name
            ]
            flipped = parameters[:1] if place.rank == place.world_size - 1 else []
            for parameter in flipped:
                parameter.data.view(torch.int32).view(-1)[-1] ^= 1
            errors[name] = _error(lambda actor=actor: check_weights(actor.chunks, actor.groups))
            for parameter in flipped:
                parameter.data.view(torch.int32).view(-1)[-1] ^= 1
        results.append(errors)
    return results


def compare_norms() -> list[str]:
    """Return the errors for equal, NaN, and different norms, and NaN on one rank."""
    nan = float("nan")
    norms = (2.0, nan, 2.0 + 0.1 * dist.get_rank(), nan if dist.get_rank() else 2.0)
    return [_error(lambda norm=norm: check_norms(norm)) for norm in norms]


def wait_for_rank_0() -> str:
    """Return what rank 0 has after twice the timeout of the default group."""
    dist.destroy_process_group()
    dist.init_process_group("gloo", timeout=timedelta(seconds=3))

    def work() -> str:
        time.sleep(6)
        return "rollouts"

    return on_rank_0(work)


def check_first_not_none() -> list[list]:
    """Return each rank's results if no rank, and if all but the first, pass an object."""
    return gather_objects(
        [
            first_not_none(None),
            first_not_none(f"of rank {dist.get_rank()}" if dist.get_rank() else None),
        ]
    )


def _with_flipped_token(mini_batches):
    mini_batches[0][0].tokens[0, 0] ^= 1
    return mini_batches


def _update(actor, spec, step: int) -> str:
    return _error(
        lambda: actor.update(make_groups(step, spec.vocab_size), lambda done, total: None)
    )


def _error(work) -> str:
    try:
        work()
    except RankMismatch as error:
        return str(error)
    return ""
