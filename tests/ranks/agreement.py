"""One bit is turned on one rank: is it named? Runs on every rank."""

import torch
import torch.distributed as dist

from megatron_espo.collectives import first_answer, gathered
from megatron_espo.mcore.agreement import Disagreement, refuse_other_norms, refuse_other_weights
from tests.ranks.resume import make_groups, make_learner


def check(folder: str, cases: list[dict]) -> list[dict[str, str]]:
    """For each layout: what is said of undisturbed ranks (nothing), and of each case's flips on the last rank."""
    answers = []
    for case in cases:
        learner, hf_config, place = make_learner(folder, "float32", case["sizes"])
        said = {"nothing": _update(learner, hf_config, 1)}
        compare = learner._compare_ranks
        if place.rank == place.world_size - 1:
            learner._compare_ranks = lambda groups, batches, compare=compare: compare(groups, _with_flipped_token(batches))
        said["tokens"] = _update(learner, hf_config, 2)
        learner._compare_ranks = compare
        for name in case["weights"]:
            parameters = [p for chunk in learner.chunks for n, p in chunk.named_parameters() if n == name]
            for parameter in parameters[:1] if place.rank == place.world_size - 1 else []:
                parameter.data.view(torch.int32).view(-1)[-1] ^= 1
            said[name] = _said(lambda learner=learner: refuse_other_weights(learner.chunks, learner.groups))
            for parameter in parameters[:1] if place.rank == place.world_size - 1 else []:
                parameter.data.view(torch.int32).view(-1)[-1] ^= 1
        answers.append(said)
    return answers


def check_norms() -> list[str]:
    """Norms that are equal, NaN, different, and NaN on one rank."""
    nan = float("nan")
    norms = (2.0, nan, 2.0 + 0.1 * dist.get_rank(), nan if dist.get_rank() else 2.0)
    return [_said(lambda norm=norm: refuse_other_norms(norm)) for norm in norms]


def check_first_answer() -> list[list]:
    """What each rank hears where no rank, and where all but the first, have an answer."""
    return gathered([first_answer(None), first_answer(f"of rank {dist.get_rank()}" if dist.get_rank() else None)])


def _with_flipped_token(mini_batches):
    mini_batches[0][0].tokens[0, 0] ^= 1
    return mini_batches


def _update(learner, hf_config, step: int) -> str:
    return _said(lambda: learner.update(make_groups(step, hf_config["vocab_size"]), lambda done, total: None))


def _said(work) -> str:
    try:
        work()
    except Disagreement as error:
        return str(error)
    return ""
