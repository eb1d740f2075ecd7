"""Trajectories of several turns: their type, packing in every layout, recorded rollouts."""

import json
import math
import threading
import zipfile
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_espo.data import rollout_store
from megatron_espo.data.packing import MicroBatch, PackingSpec, batch_totals, pack
from megatron_espo.data.rollout_store import RolloutLog
from megatron_espo.data.scored_groups import ScoredGroups
from megatron_espo.errors import InputError
from megatron_espo.monitoring.samples import sample_record
from megatron_espo.trainer import train
from megatron_espo.trainer.rollout_manager import RolloutManager
from megatron_espo.trainer.train import train_sequences
from megatron_espo.types import Prompt, SamplingMask, Trajectory
from tests.support.trajectories import single_turn, values_of
from tests.test_packing import hidden_states

QUICK = settings(max_examples=60, deadline=None, derandomize=True, database=None)
PROMPT = Prompt("p", "What?", "4", (1, 2))


def make_trajectory(
    draw: np.random.Generator, prompt: Prompt, turns: int, earlier: int = 0
) -> Trajectory:
    """Random tokens. Tokens of the environment follow each turn; after the last turn they may."""

    def part(turns: int, context: list[int], earlier: tuple[Trajectory, ...] = ()) -> Trajectory:
        mask, starts = [], []
        for turn in range(turns):
            starts.append(len(mask))
            mask += [True] * int(draw.integers(1, 5))
            mask += [False] * int(draw.integers(turn < turns - 1, 4))
        mask = np.array(mask)
        count = len(mask)
        return Trajectory(
            prompt=prompt,
            prompt_ids=context,
            response_ids=draw.integers(0, 1000, count),
            loss_mask=mask,
            # Unique values, so that a test can tell which token a value belongs to.
            logprobs=np.where(mask, -draw.random(count), 0),
            versions=np.where(mask, draw.integers(0, 9, count), -1),
            finish_reason="stop" if draw.random() < 0.7 else "length",
            text=f"text {count}",
            turns=starts,
            reward=0.5 if turns > 1 else None,
            rewards={"format": 1.0} if turns > 1 else {},
            earlier=earlier,
        )

    parts = tuple(part(int(draw.integers(1, 3)), list(prompt.token_ids)) for _ in range(earlier))
    context = [*prompt.token_ids, *draw.integers(0, 1000, 3)] if earlier else list(prompt.token_ids)
    return part(turns, context, parts)


def make_groups(seed: int, shapes: list[tuple[int, int]], samples: int = 2) -> ScoredGroups:
    """``samples`` trajectories for each ``(turns, earlier parts)``."""
    draw = np.random.default_rng(seed)
    rollouts = []
    for number, (turns, earlier) in enumerate(shapes):
        prompt = Prompt(
            f"p{number}", "", "", tuple(draw.integers(0, 1000, draw.integers(1, 6)).tolist())
        )
        rollouts.append([make_trajectory(draw, prompt, turns, earlier) for _ in range(samples)])
    rewards = torch.from_numpy(draw.random((len(shapes), samples), np.float32))
    return ScoredGroups(rollouts, rewards, len(shapes))


LAYOUTS = {
    "packed": {},
    "packed, several ranks": {"data_parallel_size": 2, "multiple_of": 4},
    "shared prompts": {"share_prompts": True},
    "padded": {"padded": True},
    "padded, cp": {"padded": True, "context_parallel_size": 2, "uniform": True},
    "cp": {"context_parallel_size": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@QUICK
@given(
    seed=st.integers(0, 2**31),
    shapes=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2)), min_size=1, max_size=4),
    max_tokens=st.integers(1, 80),
)
def test_the_model_sees_each_token_and_the_loss_each_trained_token(
    layout, seed, shapes, max_tokens
):
    """Every trained token is in the loss once, with its context, target, log-prob and advantage."""
    groups = make_groups(seed, shapes)
    options = {
        "data_parallel_size": 1,
        "context_parallel_size": 1,
        "max_tokens": max_tokens,
    } | LAYOUTS[layout]
    advantages = torch.from_numpy(np.random.default_rng(seed).normal(size=groups.rewards.shape))
    sequences = [
        s for group in train_sequences(groups, advantages, mask_truncated=False) for s in group
    ]
    parts = [part for group in groups.rollouts for sample in group for part in sample.parts]
    assert len(sequences) == len(parts)
    count = sum(sample.num_trained for group in groups.rollouts for sample in group)
    totals = batch_totals(sequences, num_responses=len(sequences), num_response_tokens=count)
    assert totals.num_tokens == sum(
        len(part.prompt_ids) + len(part.response_ids)
        for sample in groups.samples
        for part in sample.parts
    )
    found, lengths = [], []
    for rank in range(options["data_parallel_size"]):
        slices = [
            pack(
                sequences,
                totals,
                PackingSpec(data_parallel_rank=rank, context_parallel_rank=slice_rank, **options),
            )
            for slice_rank in range(options["context_parallel_size"])
        ]
        for batches in zip(*slices, strict=True):
            found += seen_tokens(batches)
            lengths += batches[0].lengths.tolist()
    advantage_of = {(i, j): np.float32(advantages[i, j]) for i, j in np.ndindex(*advantages.shape)}
    expected = [
        (
            (*part.prompt_ids, *part.response_ids[:t]),
            part.response_ids[t],
            part.logprobs[t],
            advantage_of[i, j],
        )
        for i, group in enumerate(groups.rollouts)
        for j, sample in enumerate(group)
        for part in sample.parts
        for t in np.flatnonzero(part.loss_mask)
    ]
    assert sorted(found) == sorted(expected)
    assert sorted(lengths) == sorted(int(part.loss_mask.sum()) for part in parts)
    assert sum(lengths) == count


def seen_tokens(batches: tuple[MicroBatch, ...]) -> list[tuple]:
    """``(context, target, log-prob, advantage)`` of each token in the loss of one micro-batch.

    Args:
        batches: context-parallel slices. The context follows from position ids and prefix groups.
    """
    total = int(batches[0].lengths.sum())
    rows: list[tuple | None] = [None] * total
    sequences = whole_sequences(batches)
    for number, batch in enumerate(batches):
        places = range(total) if batch.local_tokens is None else batch.local_tokens.tolist()
        for place, position, *values in zip(
            places,
            batch.logit_positions.tolist(),
            batch.targets.tolist(),
            batch.rollout_logprob.numpy(),
            batch.advantage.numpy(),
            strict=True,
        ):
            assert rows[place] is None
            rows[place] = (sequences[number, position], *values)
    assert None not in rows
    return rows


def whole_sequences(batches: tuple[MicroBatch, ...]) -> dict[tuple[int, int], tuple[int, ...]]:
    """For each slice and row of hidden states: the tokens that it attends to, itself included."""
    contexts = {}
    first = batches[0]
    if first.cu_seqlens is None:
        for row in range(len(first.tokens)):
            columns = sorted(
                (
                    int(batch.position_ids[row, column]),
                    int(batch.tokens[row, column]),
                    number,
                    column * len(batch.tokens) + row,
                )
                for number, batch in enumerate(batches)
                for column in range(batch.tokens.size(1))
            )
            add_contexts(contexts, columns)
        return contexts
    size = len(batches)
    starts = first.cu_seqlens.tolist()
    for number, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
        columns = [
            (int(batch.position_ids[0, column]), int(batch.tokens[0, column]), slice_number, column)
            for slice_number, batch in enumerate(batches)
            for column in range(start // size, stop // size)
        ]
        if first.prefix_groups is None:
            add_contexts(contexts, sorted(columns))
            continue
        prefix, *suffixes = first.prefix_groups[number]
        add_contexts(contexts, columns[:prefix])
        begin = prefix
        for length in suffixes:
            add_contexts(contexts, columns[:prefix] + columns[begin : begin + length])
            begin += length
        assert begin == stop - start
    return contexts


def add_contexts(contexts: dict, columns: list[tuple[int, int, int, int]]) -> None:
    assert [position for position, *_ in columns] == list(range(len(columns))), (
        "position ids count up"
    )
    tokens = tuple(token for _, token, *_ in columns)
    for place, (_, _, number, row) in enumerate(columns):
        contexts[number, row] = tokens[: place + 1]


def test_values_of_other_tokens_change_nothing():
    """Log-probs and entropies of tokens that were not sampled do not reach a micro-batch."""
    groups = make_groups(3, [(3, 0), (2, 1)])
    sequences = [
        s
        for group in train_sequences(groups, torch.ones(2, 2), mask_truncated=False)
        for s in group
    ]
    sequences = [
        replace(s, old_logprobs=s.rollout_logprobs, old_entropies=-s.rollout_logprobs)
        for s in sequences
    ]
    assert not all(s.loss_mask.all() for s in sequences)

    def noisy(values, mask):
        return np.where(mask, values, math.nan)

    changed = [
        replace(
            s,
            rollout_logprobs=noisy(s.rollout_logprobs, s.loss_mask),
            old_logprobs=noisy(s.old_logprobs, s.loss_mask),
            old_entropies=noisy(s.old_entropies, s.loss_mask),
        )
        for s in sequences
    ]
    totals = batch_totals(sequences, num_responses=9, num_response_tokens=99)
    for name, layout in LAYOUTS.items():
        options = {"data_parallel_rank": 0, "data_parallel_size": 1, "max_tokens": 60} | layout
        spec = PackingSpec(**options)
        for one, other in zip(
            pack(sequences, totals, spec), pack(changed, totals, spec), strict=True
        ):
            for field, value in vars(one).items():
                same = (
                    torch.equal(value, getattr(other, field))
                    if isinstance(value, torch.Tensor)
                    else value == getattr(other, field)
                )
                assert same, (name, field)


def test_logits_of_other_tokens_have_no_gradient():
    """The gradient at hidden states is zero exactly in rows that predict no trained token."""
    from megatron_espo.megatron.forward_step import score_tokens

    groups = make_groups(4, [(3, 0), (2, 1)])
    sequences = [
        s
        for group in train_sequences(groups, torch.ones(2, 2), mask_truncated=False)
        for s in group
    ]
    totals = batch_totals(sequences, num_responses=9, num_response_tokens=99)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        options = {"group": dist.group.WORLD, "temperature": 0.7, "vocab_size": 1000}
        for layout in ({}, {"padded": True}, {"share_prompts": True}):
            (batch,) = pack(sequences, totals, PackingSpec(9999, 0, 1, **layout))
            batch = batch.to(torch.device("cpu"))
            draw = torch.Generator().manual_seed(5)
            hidden = torch.randn(*batch.tokens.t().shape, 8, generator=draw).requires_grad_()
            weight = torch.randn(1000, 8, generator=draw)
            layer = SimpleNamespace(sequence_parallel=False)
            output = score_tokens(
                options | {"entropy_grad": True},
                hidden_states=hidden,
                output_layer=layer,
                output_weight=weight,
                context=batch,
            )
            output.square().sum().backward()
            rows = hidden.grad.flatten(0, 1).abs().sum(1)
            trained = torch.zeros(len(rows), dtype=torch.bool).index_fill(
                0, batch.logit_positions, True
            )
            assert (rows[trained] > 0).all() and (rows[~trained] == 0).all()
            assert (
                int(trained.sum())
                == sum(s.num_trained for s in sequences)
                < len(hidden_states(batch))
            )
    finally:
        dist.destroy_process_group()


def test_all_parts_share_advantage_and_truncation():
    groups = make_groups(5, [(2, 2)], samples=2)
    ends = [
        replace(sample, finish_reason=reason)
        for sample, reason in zip(groups.rollouts[0], ("length", "stop"), strict=True)
    ]
    groups = ScoredGroups([ends], groups.rewards, 1)
    (sequences,) = train_sequences(
        groups, torch.tensor([[0.5, -0.25]]), mask_truncated=True, logged_sample={(0, 1): 7}
    )
    assert [s.advantage for s in sequences] == [0.5] * 3 + [-0.25] * 3
    assert [s.masked for s in sequences] == [True] * 3 + [False] * 3
    assert [s.logged_sample for s in sequences] == [None] * 5 + [7]


def test_a_sequence_without_trained_tokens_is_refused():
    bare = replace(make_trajectory(np.random.default_rng(1), PROMPT, 1), reward=0.0)
    bare = replace(bare, loss_mask=np.zeros(len(bare.response_ids), bool))
    with pytest.raises(
        ValueError, match="loss_mask: expected at least one trained token, got a mask of . False"
    ):
        train_sequences(
            ScoredGroups([[bare]], torch.zeros(1, 1), 1), torch.ones(1, 1), mask_truncated=False
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": [0.0]}, r"Trajectory.logprobs: expected shape \[2\], got \[1\]"),
        ({"loss_mask": [1, 0]}, "Trajectory.loss_mask: expected dtype bool, got int64"),
        (
            {"response_ids": [1.0, 2.5]},
            "Trajectory.response_ids: expected dtype int32, got float64",
        ),
        (
            {"prompt_ids": [[1]]},
            r"Trajectory.prompt_ids: expected shape \[any length\], got \[1, 1\]",
        ),
        (
            {"routed_experts": np.zeros((3, 2))},
            r"routed_experts: expected shape \[tokens - 1, layers, top_k\], got \[3, 2\]",
        ),
    ],
)
def test_the_error_names_the_field(change, message):
    trajectory = single_turn(PROMPT, (5, 6), (-1.0, -2.0), 3, "stop", "x")
    with pytest.raises(ValueError, match=message):
        replace(trajectory, **change)


def test_counts():
    draw = np.random.default_rng(2)
    trajectory = make_trajectory(draw, PROMPT, 2, earlier=1)
    assert trajectory.num_trained == sum(part.loss_mask.sum() for part in trajectory.parts)
    with pytest.raises(ValueError, match="nested parts"):
        replace(trajectory, earlier=(trajectory,))
    single = single_turn(PROMPT, (5, 6), (-1.0, -2.0), (3, 4), "stop", "x")
    assert single.versions.tolist() == [3, 4] and single.turns.tolist() == [0]
    assert single.num_trained == 2
    assert single.prompt_ids.tolist() == [1, 2]


def test_staleness_counts_sampled_tokens():
    single = single_turn(PROMPT, (5, 6, 7), (-1.0,) * 3, (2, 3, 4), "stop", "x")
    masked = replace(single, loss_mask=[True, False, True], versions=[4, -1, 4])
    groups = ScoredGroups([[single, masked]], torch.zeros(1, 2), 1)
    assert groups.staleness(6) == pytest.approx((3 + 2 + 1 + 1 + 1) / 5)
    assert groups.max_staleness(6) == 3
    assert groups.lengths().tolist() == [[3, 2]]


def test_trajectories_survive_the_file(tmp_path, capsys):
    """All fields, also of earlier parts and of rewards that are NaN."""
    draw = np.random.default_rng(6)
    groups = make_groups(6, [(3, 0), (1, 2), (2, 1)])
    groups.rewards[1, 0] = math.nan
    prompts = [
        replace(group[0].prompt, text="é\n", metadata={"entry": [1, {"a": None}]})
        for group in groups.rollouts
    ]

    def with_ids(counts: np.ndarray) -> SamplingMask:
        return SamplingMask(draw.integers(0, 999, counts.sum()), counts)

    masks = (lambda counts: None), with_ids

    def with_experts(sample: Trajectory, prompt: Prompt) -> Trajectory:
        shape = (len(sample.prompt_ids) + len(sample.response_ids) - 1, 2, 3)
        earlier = tuple(with_experts(part, prompt) for part in sample.earlier)
        return replace(
            sample,
            prompt=prompt,
            earlier=earlier,
            routed_experts=draw.integers(0, 999, shape, np.uint16),
            sampling_mask=masks[len(sample.response_ids) % 2](sample.loss_mask * 3),
        )

    rollouts = [
        [with_experts(s, p) for s in group]
        for group, p in zip(groups.rollouts, prompts, strict=True)
    ]
    groups = ScoredGroups(rollouts, groups.rewards, 5, in_flight=2)
    log = RolloutLog(tmp_path, {"seed": 1})
    log.write(3, groups, before={"at": 1}, after={"at": 2})
    log.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003.npz"]
    found, after = log.read(3, {"at": 1})
    assert after == {"at": 2} and (found.dispatched, found.in_flight) == (5, 2)
    assert values_of(found.rollouts) == values_of(rollouts) and found.have_routed_experts
    assert torch.equal(found.rewards.nan_to_num(7), groups.rewards.nan_to_num(7))
    for one, other in zip(sum(rollouts, []), sum(found.rollouts, []), strict=True):
        for part, copy in zip(one.parts, other.parts, strict=True):
            assert part.routed_experts.dtype == copy.routed_experts.dtype
            assert np.array_equal(part.routed_experts, copy.routed_experts)
            mask, other = part.sampling_mask, copy.sampling_mask
            assert (mask is None) == (other is None) == (len(part.response_ids) % 2 == 0)
            if mask is not None:
                assert np.array_equal(mask.ids, other.ids)
                assert np.array_equal(mask.counts, other.counts)
    assert log.read(3, {"at": 0}) is None and log.read(4, None) is None
    assert RolloutLog(tmp_path, {"seed": 2}).read(3, {"at": 1}) is None
    assert "seed changed" in capsys.readouterr().out
    assert RolloutLog(tmp_path, {"seed": 2}).read(3, None) is not None


@pytest.mark.parametrize(
    "name", ["response_ids", "loss_mask", "logprobs", "rewards", "step.json", "texts.txt"]
)
def test_a_flipped_bit_is_found(tmp_path, name):
    log = RolloutLog(tmp_path, {})
    log.write(1, make_groups(7, [(3, 1)]), before={}, after={})
    log.wait()
    path = tmp_path / "step_000001.npz"
    member = name if "." in name else f"{name}.npy"
    with zipfile.ZipFile(path) as archive:
        content = archive.read(member)
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(content) + len(content) - 1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(
        InputError,
        match="step_000001.npz: expected recorded rollouts, found damage .*remove the file",
    ):
        log.read(1, {})
    path.write_bytes(damaged[: len(damaged) // 2])
    with pytest.raises(InputError, match="found damage"):
        log.read(1, {})


def test_texts_survive_the_file(tmp_path):
    """Texts of several bytes a character, empty texts, and half of a surrogate pair."""
    texts = ["", "é€😀" * 5, "\ud83d", "\ude00 \0\n", "", "abc"]
    samples = [single_turn(PROMPT, (5,), (-1.0,), 0, "stop", text) for text in texts]
    log = RolloutLog(tmp_path, {})
    log.write(1, ScoredGroups([samples], torch.zeros(1, len(texts)), 1), before={}, after={})
    assert [sample.text for sample in log.read(1, {})[0].samples] == texts


@pytest.mark.parametrize("number", [np.float32, np.int64, np.bool_, torch.tensor])
def test_rewards_of_any_number_type_and_any_metadata_are_recorded(tmp_path, number):
    prompt = replace(PROMPT, metadata={"seen": {4}})
    bare = single_turn(prompt, (5,), (-1.0,), 0, "stop", "x")
    sample = replace(bare, reward=number(1), rewards={"format": number(0)})
    log = RolloutLog(tmp_path, {})
    log.write(1, ScoredGroups([[sample]], torch.ones(1, 1), 1), before={}, after={})
    (found,) = log.read(1, {})[0].samples
    assert (found.reward, found.rewards) == (1.0, {"format": 0.0})
    with pytest.raises(ValueError):
        replace(sample, reward="high")


def test_the_log_is_written_in_the_background(tmp_path, monkeypatch):
    """One write at a time; ``wait`` and ``read`` return when the file is durable."""
    log, events, allowed = RolloutLog(tmp_path, {}), [], threading.Event()

    def slowly(*paths):
        if paths != (tmp_path,):
            allowed.wait(10)
            events.append("durable")

    monkeypatch.setattr(rollout_store, "make_durable", slowly)
    groups = make_groups(7, [(3, 1)])
    log.write(1, groups, before={}, after={})
    assert not list(tmp_path.glob("*.npz")) and not events
    threading.Timer(0.05, allowed.set).start()
    log.write(2, groups, before={}, after={})
    assert "durable" in events and (tmp_path / "step_000001.npz").exists()
    assert values_of(log.read(2, {})[0].rollouts) == values_of(groups.rollouts)
    log.write(3, groups, before={}, after={})
    log.close()
    assert len(events) == 3 and (tmp_path / "step_000003.npz").exists()


def test_an_error_of_the_log_is_raised_by_the_next_call(tmp_path):
    groups = make_groups(7, [(3, 1)])
    (tmp_path / "file").touch()
    for next_call in (
        RolloutLog.wait,
        RolloutLog.close,
        lambda log: log.read(1, {}),
        lambda log: log.write(2, groups, before={}, after={}),
    ):
        log = RolloutLog(tmp_path / "file", {})
        log.write(1, groups, before={}, after={})
        with pytest.raises(OSError):
            next_call(log)
        log.wait()  # an error is raised once


def test_an_error_of_the_log_ends_a_step_before_metrics_and_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    log = RolloutLog(tmp_path / "file", {})
    log.write(1, make_groups(7, [(3, 1)]), before={}, after={})
    manager = object.__new__(RolloutManager)
    manager._log = log
    monkeypatch.setattr(train, "advantages_of", lambda *_: (None, None))
    monkeypatch.setattr(train, "train_sequences", lambda *_: [])
    run = MagicMock(step=0)
    run.rollouts.wait_for_record = manager.wait_for_record
    with pytest.raises(OSError):
        train.Run.train_step(run, 1)
    run.actor.update.assert_called_once()
    assert run.step == 0 and not run.reporter.write.called and not run.ledger.count.called
    assert not run._save.called and not run._finish_save.called


def test_rollouts_of_an_earlier_format_are_refused(tmp_path):
    log = RolloutLog(tmp_path, {})
    with zipfile.ZipFile(tmp_path / "step_000001.npz", "w") as archive:
        archive.writestr("step.json", json.dumps({"fingerprint": {}, "before": {}, "after": {}}))
    with pytest.raises(InputError, match="expected recorded rollouts of format 2.*earlier release"):
        log.read(1, {})


def test_a_logged_sample_has_no_entropy_where_the_policy_did_not_sample():
    from megatron_espo.monitoring.report.page import _shown

    sample = Trajectory(
        PROMPT,
        [1, 2],
        [65, 66, 67],
        [True, False, True],
        [-1, 0, -2],
        [3, -1, 4],
        "stop",
        "ABC",
        [0, 2],
    )
    entropies = ([0.5, 2.0], [0, 1])
    record = sample_record(5, sample, 1.0, 0.5, lambda ids: bytes(ids).decode(), entropies)
    assert record["mask"] == [1, 0, 1] and record["policy_versions"] == [3, 4]
    assert record["entropies"] == [0.5, None, 2.0]
    shown = _shown(record, 2.0)["shown"]
    assert [token["heat"] for token in shown] == [25, 0, 100] and [
        token["top"] for token in shown
    ] == [False, False, True]
    assert shown[1]["title"] == "token 66"
