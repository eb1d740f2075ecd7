"""Rank 0's rollouts reach every rank as arrays."""

from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from megatron_espo.data.scored_groups import ScoredGroups, broadcast_groups
from megatron_espo.types import Prompt, Trajectory
from tests.support.distributed import run_ranks


def make_groups() -> ScoredGroups:
    prompt = Prompt("p", "What?", "4", (1, 2), {"level": 3})
    experts = np.zeros((4, 2, 2), np.uint8)
    first = Trajectory.single_turn(prompt, (5, 6, 7), (-1.0, -2.0, -3.0), 4, "stop", "abc")
    first = replace(first, routed_experts=experts)
    mask, turns = [True, False, True], [0, 2]
    last = replace(first, loss_mask=mask, turns=turns, reward=0.5, rewards={"form": 1.0})
    other = Trajectory.single_turn(prompt, (8,), (-0.5,), 4, "length", "d")
    other = replace(other, routed_experts=experts[:2])
    samples = [replace(last, earlier=(first,)), other]
    return ScoredGroups([samples], torch.tensor([[0.5, float("nan")]]), dispatched=3, in_flight=2)


def broadcast_on_rank() -> list[list[bool]]:
    """Whether the arrays are equal and the texts and experts are absent, on every rank."""
    sent = make_groups()
    got = broadcast_groups(sent if dist.get_rank() == 0 else None)
    prompt = replace(sent.rollouts[0][0].prompt, text="", answer="", metadata={})

    def bare(sample: Trajectory) -> Trajectory:
        earlier = tuple(map(bare, sample.earlier))
        return replace(sample, prompt=prompt, text="", routed_experts=None, earlier=earlier)

    same = [
        list(map(bare, got.samples)) == list(map(bare, sent.samples)),
        torch.equal(got.rewards.nan_to_num(9.0), sent.rewards.nan_to_num(9.0)),
        (got.dispatched, got.in_flight) == (3, 2),
        got is sent or not any(s.text or s.prompt.text for s in got.samples),
        got is sent or not got.have_routed_experts,
    ]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, same)
    return everyone


def test_every_rank_gets_the_arrays_without_texts_and_experts():
    assert run_ranks(2, "tests.test_scored_groups:broadcast_on_rank") == [[True] * 5] * 2
