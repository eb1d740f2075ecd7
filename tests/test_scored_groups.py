"""Every rank gets the outline of rank 0's rollouts, and the tokens that it trains."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_espo.data.packing import PackingSpec, batch_totals, pack
from megatron_espo.data.scored_groups import (
    ScoredGroups,
    broadcast_groups,
    from_outline,
    to_outline,
)
from megatron_espo.distributed.checksum import array_checksum
from megatron_espo.distributed.collectives import gather_objects
from megatron_espo.megatron import consistency, scatter
from megatron_espo.trainer.train import train_sequences
from megatron_espo.types import Prompt, SamplingMask, Trajectory
from tests.support.distributed import run_ranks

TP2, CP2 = {"tensor_model_parallel_size": 2}, {"context_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}


def make_groups(prompts: int = 12, samples: int = 4) -> ScoredGroups:
    """Trajectories of one and of two parts, some with tokens of an environment."""
    draw, rollouts = np.random.default_rng(3), []

    def part(prompt: Prompt, context: list[int], number: int) -> Trajectory:
        length = int(draw.integers(400, 1200))
        mask = draw.random(length) < (1.0 if number % 3 else 0.7)
        mask[0] = True
        ids, logprobs = draw.integers(0, 999, length), -draw.random(length)
        start = (prompt, context, ids, mask, logprobs, np.full(length, number), "stop", "text", [0])
        return Trajectory(*start, routed_experts=np.zeros((length + len(context) - 1, 2, 2), "u1"))

    for number in range(prompts):
        ids = draw.integers(0, 999, 5).tolist()
        prompt = Prompt(f"p{number}", "What?", "4", tuple(ids), {"level": 3})
        group = [part(prompt, ids, number + i) for i in range(samples)]
        group[0] = replace(group[0], earlier=(part(prompt, ids, number),), finish_reason="length")
        rollouts.append(group)
    rewards = torch.from_numpy(draw.random((prompts, samples), np.float32))
    rewards[1, 2] = torch.nan
    return ScoredGroups(rollouts, rewards, prompts + 1, in_flight=1)


def test_an_outline_has_lengths_masks_and_rewards_only():
    groups = make_groups()
    found = from_outline(to_outline(groups))
    assert torch.equal(found.rewards.nan_to_num(7), groups.rewards.nan_to_num(7))
    assert torch.equal(found.lengths(), groups.lengths())
    assert (found.dispatched, found.in_flight) == (groups.dispatched, groups.in_flight)
    assert not found.have_routed_experts and len(found.rollouts) == len(groups.rollouts)
    keys = set()
    for group, other in zip(groups.rollouts, found.rollouts, strict=True):
        for sample, outline in zip(group, other, strict=True):
            assert outline.finish_reason == sample.finish_reason
            for part, bare in zip(sample.parts, outline.parts, strict=True):
                assert np.array_equal(part.loss_mask, bare.loss_mask)
                assert len(part.prompt_ids) == len(bare.prompt_ids)
                assert len(part.response_ids) == len(bare.response_ids)
                assert not (bare.response_ids.any() or bare.logprobs.any() or bare.prompt.text)
                keys.add(bare.prompt_ids.tobytes())
    assert len(keys) == len(groups.rollouts), "responses to one prompt share it"


def with_masks(groups: ScoredGroups) -> ScoredGroups:
    """The same trajectories; the sampler kept one to three ids for each sampled token."""
    draw = np.random.default_rng(4)

    def add(part: Trajectory) -> Trajectory:
        counts = draw.integers(1, 4, len(part.loss_mask)) * part.loss_mask
        mask = SamplingMask(part.response_ids.repeat(counts) + 1000, counts)
        mask.ids[(counts.cumsum() - 1)[part.loss_mask]] -= 1000  # the last is the token itself
        return replace(part, sampling_mask=mask, earlier=tuple(map(add, part.earlier)))

    return replace(groups, rollouts=[list(map(add, group)) for group in groups.rollouts])


def sequences_of(groups: ScoredGroups) -> list:
    advantages = torch.from_numpy(np.random.default_rng(1).normal(size=groups.rewards.shape))
    advantages[0, :2] = 0
    sequences = train_sequences(groups, advantages, mask_truncated=True)
    return [s for group in sequences for s in group if s.advantage and not s.masked]


def scatter_on_rank(sizes: dict, share_prompts: bool, masks: bool = False) -> list[dict]:
    """For each rank: whether its micro-batches are those of a rank that holds everything, the bytes
    that it received, and those of its share.
    """
    from megatron_espo.distributed import runtime

    place = runtime.initialize(**sizes)
    whole_groups = with_masks(make_groups()) if masks else make_groups()
    groups, sent = place.groups, whole_groups
    received = {"outline": 0, "share": 0}
    with pytest.MonkeyPatch.context() as patch:
        from_tensor, phase = distributed_c10d._tensor_to_object, "outline"

        def counting(tensor, size, group):
            received[phase] += tensor.nbytes
            return from_tensor(tensor, size, group)

        patch.setattr(distributed_c10d, "_tensor_to_object", counting)
        got = broadcast_groups(sent if place.is_main else None)
        sequences, phase = sequences_of(got), "share"
        if dist.get_world_size() > 1:
            sequences = scatter.scatter_sequences(sequences, groups, share_prompts)
    whole = sequences_of(sent)
    assert 0 < len(whole) < sum(len(sample.parts) for sample in sent.samples)
    totals = batch_totals(whole, num_responses=9, num_response_tokens=99)
    spec = PackingSpec(
        4000, groups.dp.rank(), groups.dp.size(), share_prompts=share_prompts,
        context_parallel_rank=groups.cp.rank(), context_parallel_size=groups.cp.size(),
    )  # fmt: skip
    found, expected = (pack(of, totals, spec) for of in (sequences, whole))
    consistency.check_fingerprints(consistency.data_fingerprints(sequences, found, groups))
    shards = scatter.shard_by_tokens(whole, groups.dp.size(), share_prompts)
    share = [whole[i] for group in shards[groups.dp.rank()] for i in group]
    everyone: list = [None] * dist.get_world_size()

    def num_bytes(of: list) -> int:
        names = ("prompt_ids", "response_ids", "rollout_logprobs", "loss_mask", "routed_experts")
        arrays = [getattr(s, name) for s in of for name in names]
        for s in of if masks else []:
            arrays += s.sampling_mask.counts, s.sampling_mask.ids
        return sum(array.nbytes for array in arrays)

    answer = {
        "same": len(found) == len(expected) and all(map(same_batch, found, expected)),
        "share bytes": num_bytes(share),
        "all bytes": num_bytes(whole),
        **received,
    }
    dist.all_gather_object(everyone, answer)
    return everyone


def same_batch(one, other) -> bool:
    return all(
        torch.equal(value, getattr(other, name))
        if isinstance(value, torch.Tensor)
        else value == getattr(other, name)
        for name, value in vars(one).items()
    )


def scatter_in_layouts(layouts: list) -> list[list[dict]]:
    return [scatter_on_rank(*layout) for layout in layouts]


@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [
        (1, [({}, True), ({}, True, True)]),
        (2, [({}, True), (TP2, False), (PP2, True), ({}, True, True)]),
        pytest.param(
            4, [({}, False), (TP2, True, True), (CP2, False, True)], marks=pytest.mark.slow
        ),
    ],
)
def test_every_rank_receives_its_share_and_packs_what_it_packed_from_everything(ranks, layouts):
    answers = run_ranks(ranks, "tests.test_scored_groups:scatter_in_layouts", layouts=layouts)
    for layout, everyone in zip(layouts, answers, strict=True):
        for rank, answer in enumerate(everyone):
            assert answer["same"], (layout, rank, answer)
            if rank:
                assert 1 <= answer["share"] / answer["share bytes"] < 1.2, (layout, rank, answer)
            assert answer["outline"] < answer["all bytes"] / 8, (layout, rank, answer)


def scatter_damaged(places: list[int]) -> list[list[str]]:
    """The errors of all ranks, for each byte of a message in which a bit flips on its way."""
    from megatron_espo.distributed import runtime

    groups, errors = runtime.initialize().groups, []
    from_tensor = distributed_c10d._tensor_to_object
    for place in places:

        def flipping(tensor, size, group, place=place):
            if dist.get_rank() == 1 and size > 20_000:
                tensor[place] ^= 1
            return from_tensor(tensor, size, group)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed_c10d, "_tensor_to_object", flipping)
            try:
                scatter.scatter_sequences(sequences_of(make_groups()), groups, False)
                error = ""
            except consistency.RankMismatch as mismatch:
                error = str(mismatch)
        errors.append(gather_objects(error))
    return errors


def test_a_bit_lost_on_the_way_is_named():
    # The first place is in the name of a class, the second in the values.
    for errors in run_ranks(2, "tests.test_scored_groups:scatter_damaged", places=[50, 10_000]):
        for error in errors:
            assert error.startswith("responses of data-parallel rank 1 (checksum): expected")


def test_an_array_checksum_depends_on_every_word_and_the_order_of_blocks():
    values = np.arange(5000, dtype=np.int32)  # four blocks and a rest
    whole = array_checksum(values)
    assert array_checksum(np.repeat(values, 2)[::2]) == whole != array_checksum(values, start=1)
    for place in (0, 1023, 4095, 4096, 4999):
        changed = values.copy()
        changed[place] ^= 1
        assert array_checksum(changed) != whole, place
    assert array_checksum(np.r_[values[1024:2048], values[:1024], values[2048:]]) != whole
    assert array_checksum(values[:4]) != array_checksum(values[:3])


def test_equal_tokens_have_equal_checksums():
    """A change of one token, advantage or mask of one rank changes its fingerprints."""
    size = SimpleNamespace(rank=lambda: 0, size=lambda: 2)
    place = SimpleNamespace(dp=size, cp=size, tp=size, pp=size)
    groups = make_groups()
    flat = [s for g in train_sequences(groups, torch.ones(12, 4), False) for s in g]
    flat = [replace(s, routed_experts=None) for s in flat]
    totals = batch_totals(flat, num_responses=1, num_response_tokens=1)

    def fingerprints(sequences) -> tuple:
        batches = pack(sequences, totals, PackingSpec(4000, 0, 1))
        return tuple(consistency.data_fingerprints(sequences, batches, place).values())

    step, own = fingerprints(flat)
    assert fingerprints([replace(s) for s in flat]) == (step, own)
    ids = flat[5].response_ids.copy()
    ids[3] += 1
    number = next(i for i, s in enumerate(flat) if not s.loss_mask.all())
    ids = flat[number].response_ids + 1
    for changes, differ in (
        ({"response_ids": ids}, (False, True)),
        ({"advantage": -1.0}, (True, True)),
        ({"loss_mask": ~flat[number].loss_mask}, (True, True)),
    ):
        changed = [*flat[:number], replace(flat[number], **changes), *flat[number + 1 :]]
        found = fingerprints(changed)
        assert (found[0] != step, found[1] != own) == differ, changes
