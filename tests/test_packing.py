"""Micro-batches contain every response token once, in the right place and within the limits, and
give the loss of the whole batch.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_espo.algo import OBJECTIVES, LossInputs, load_objective
from megatron_espo.config import Algorithm
from megatron_espo.data.packing import (
    MicroBatch,
    PackingSpec,
    TrainSequence,
    batch_totals,
    pack,
)
from megatron_espo.types import SamplingMask

QUICK = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SIZES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 12)), max_size=12)
VOCAB = 131


def make_sequences(sizes: list[tuple[int, int]]) -> list[TrainSequence]:
    """Sequences with the token ids 1, 2, 3, ...

    The id determines the log-prob, the expert and the kept ids (t or t, t + 1000) of a token.
    """
    sequences, first = [], 1
    for number, (prompt, response) in enumerate(sizes):
        ids = list(range(first, first + prompt + response))
        first = ids[-1] + 1
        logprobs = [-t / 1000 for t in ids[prompt:]]
        experts = np.array(ids[:-1], np.uint16)[:, None, None]
        kept = [[t, t + 1000][: 1 + t % 2] for t in ids[prompt:]]
        mask = SamplingMask(np.concatenate(kept), [len(each) for each in kept])
        options = {"routed_experts": experts, "sampling_mask": mask}
        sequences.append(
            TrainSequence(ids[:prompt], ids[prompt:], logprobs, advantage=number - 1.5, **options)
        )
    return sequences


def pack_ranks(sequences, ranks: int, **options) -> list[list[MicroBatch]]:
    """Micro-batches of each data-parallel rank."""
    totals = batch_totals(sequences, num_responses=99, num_response_tokens=999)
    specs = [
        PackingSpec(data_parallel_rank=rank, data_parallel_size=ranks, **options)
        for rank in range(ranks)
    ]
    return [pack(sequences, totals, spec) for spec in specs]


def unpack(batch: MicroBatch) -> list[TrainSequence]:
    """The sequences of a micro-batch, rebuilt from its tensors.

    Checks boundaries, positions and padding.
    """
    tokens, positions = batch.tokens[0].tolist(), batch.position_ids[0].tolist()
    boundaries = batch.cu_seqlens.tolist()
    spans = list(zip(boundaries, boundaries[1:], strict=False))
    assert boundaries[0] == 0 and boundaries[-1] == len(tokens) == len(positions)
    assert batch.max_seqlen == max(end - start for start, end in spans)
    assert positions == [i for start, end in spans for i in range(end - start)]
    lengths = batch.lengths.tolist()
    assert len(spans) - len(lengths) in (0, 1)  # the last one may be padding
    padding = tokens[slice(*spans[-1])] if len(spans) > len(lengths) else []
    assert not any(padding) and batch.num_tokens == len(tokens) - len(padding)
    per_token = (batch.logit_positions, batch.targets, batch.rollout_logprob, batch.advantage)
    rows = zip(*(t.tolist() for t in per_token), strict=True)
    sequences = []
    for (start, end), length in zip(spans, lengths, strict=False):
        prompt = end - start - length
        mine = [next(rows) for _ in range(length)]
        # A token is predicted from the position before it, never across a boundary.
        assert [p for p, *_ in mine] == list(range(start + prompt - 1, end - 1)) and prompt >= 1
        assert [target for _, target, *_ in mine] == tokens[start + prompt : end]
        (advantage,) = {a for *_, a in mine}
        sequences.append(
            TrainSequence(
                tokens[start : start + prompt],
                tokens[start + prompt : end],
                [g for *_, g, _ in mine],
                advantage,
            )
        )
    assert next(rows, None) is None
    return sequences


@QUICK
@given(
    sizes=SIZES,
    ranks=st.integers(1, 4),
    max_tokens=st.integers(1, 40),
    max_sequences=st.one_of(st.none(), st.integers(1, 3)),
    multiple_of=st.sampled_from([1, 2, 8]),
)
def test_every_sequence_is_packed_once(sizes, ranks, max_tokens, max_sequences, multiple_of):
    sequences = make_sequences(sizes)
    shares = pack_ranks(
        sequences,
        ranks,
        max_tokens=max_tokens,
        max_sequences=max_sequences,
        multiple_of=multiple_of,
    )
    assert len({len(share) for share in shares}) == 1, (
        "a collective of one rank would have no partner"
    )
    found = []
    for share in shares:
        assert share
        for batch in share:
            assert (
                batch.tokens.size(1) % multiple_of == 0
                and 0 < batch.tokens.size(1) < batch.num_tokens + multiple_of + 1
            )
            inside = unpack(batch)
            assert batch.num_tokens <= max_tokens or len(inside) == 1
            assert max_sequences is None or len(inside) <= max_sequences
            assert batch.totals.num_tokens == max(1, sum(p + r for p, r in sizes))
            found += inside
    found.sort(key=lambda s: s.prompt_ids[0])
    for one, other in zip(found, sequences, strict=True):
        for name in ("prompt_ids", "response_ids", "rollout_logprobs", "advantage"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


@QUICK
@given(sizes=SIZES.filter(bool), ranks=st.integers(2, 4))
def test_ranks_are_balanced(sizes, ranks):
    loads = [
        sum(b.num_tokens for b in share)
        for share in pack_ranks(make_sequences(sizes), ranks, max_tokens=20)
    ]
    assert max(loads) - min(loads) <= max(p + r for p, r in sizes)


def test_sequence_over_the_budget_has_its_own_micro_batch():
    (share,) = pack_ranks(make_sequences([(2, 3), (4, 30), (1, 2)]), 1, max_tokens=8)
    assert [(b.num_tokens, b.lengths.tolist()) for b in share] == [(34, [30]), (8, [3, 2])]


def test_empty_micro_batch_is_padding_and_its_loss_is_zero():
    (_, (batch,)) = pack_ranks(make_sequences([(2, 3)]), 2, max_tokens=8, multiple_of=4)
    assert (
        batch.tokens.tolist() == [[0] * 4]
        and batch.cu_seqlens.tolist() == [0, 4]
        and batch.num_tokens == 0
    )
    assert (
        batch.lengths.numel()
        == batch.logit_positions.numel()
        == batch.targets.numel()
        == batch.advantage.numel()
        == 0
    )
    for objective in OBJECTIVES:
        logprob = torch.zeros(0, requires_grad=True)
        loss, _ = objective_loss(objective, logprob, batch)
        loss.backward()
        assert loss == 0 and logprob.grad.shape == (0,)


def objective_loss(name: str, logprob: torch.Tensor, batch: MicroBatch):
    algorithm = Algorithm(objective=name, advantage="dr_grpo" if name == "dr_grpo" else "grpo")
    objective = load_objective(algorithm, max_response_tokens=16)
    entropy = (batch.targets.double() * 0.7).sin().abs() * math.log(VOCAB)
    totals = {
        "num_responses": batch.totals.num_responses,
        "num_tokens": batch.totals.num_response_tokens,
    }
    segments = objective.segment_tokens(entropy, batch.lengths, vocab_size=VOCAB, **totals)
    old, advantage = batch.rollout_logprob.double(), batch.advantage.double()
    return objective.loss(LossInputs(logprob, old, advantage, segments)).loss, segments


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_add_up_to_the_whole_batch(objective):
    sequences = make_sequences([(1, 1), (2, 9), (3, 12), (1, 4), (5, 5), (2, 2), (1, 10)])
    table = -torch.rand(200, generator=torch.Generator().manual_seed(2), dtype=torch.float64) / 5

    def loss_and_gradient(batches: list[MicroBatch]):
        leaf = table.clone().requires_grad_()
        loss = sum(objective_loss(objective, leaf[b.targets], b)[0] for b in batches)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    ((whole,),) = pack_ranks(sequences, 1, max_tokens=1000)
    loss, gradient = loss_and_gradient([whole])
    assert gradient.count_nonzero() > 3
    for ranks, max_tokens in ((1, 1), (2, 20), (3, 14)):
        batches = [
            b
            for share in pack_ranks(sequences, ranks, max_tokens=max_tokens, multiple_of=2)
            for b in share
        ]
        assert len(batches) > 1
        torch.testing.assert_close(loss_and_gradient(batches), (loss, gradient))


@pytest.mark.parametrize(
    "arguments",
    [([], [1], [-1.0]), ([1], [], []), ([1], [1, 2], [-1.0]), ([1], [1.5], [-1.0])],
    ids=["prompt", "response", "log-probs", "ids"],
)
def test_invalid_sequence_raises(arguments):
    with pytest.raises(ValueError, match="TrainSequence.*: expected"):
        TrainSequence(*arguments, advantage=1.0)


@pytest.mark.parametrize(
    "change",
    [
        *({"advantage": x} for x in (math.nan, math.inf, [1.0])),
        {"rollout_logprobs": [-1.0, math.nan, -1.0]},
    ],
    ids=str,
)
def test_values_that_are_not_finite_numbers_raise(change):
    (sequence,) = make_sequences([(2, 3)])
    with pytest.raises(ValueError, match="TrainSequence.*: expected"):
        replace(sequence, **change)
    replace(sequence, loss_mask=[True, False, True], rollout_logprobs=[-1.0, math.nan, -1.0])


def test_to_moves_every_tensor():
    (sequence,) = make_sequences([(2, 3)])
    known = replace(sequence, old_logprobs=sequence.rollout_logprobs, old_entropies=[0.5] * 3)
    ((batch,),) = pack_ranks([known], 1, max_tokens=8, context_parallel_size=2)
    tensors = {n: v for n, v in vars(batch.to("meta")).items() if isinstance(v, torch.Tensor)}
    assert len(tensors) == 13 and {t.device.type for t in tensors.values()} == {"meta"}
    assert {tensors[name].dtype for name in ("tokens", "logit_positions")} == {torch.int64}


@pytest.mark.parametrize(
    ("name", "field"), [("old_logprobs", "old_logprob"), ("old_entropies", "old_entropy")]
)
def test_known_values_stay_with_their_tokens(name, field):
    sequences = [
        replace(s, **{name: [float(t) for t in s.response_ids]})
        for s in make_sequences([(1, 4), (2, 7)])
    ]
    for rank in range(2):
        ((batch,),) = pack_ranks(
            sequences, 1, max_tokens=99, context_parallel_rank=rank, context_parallel_size=2
        )
        assert getattr(batch, field).tolist() == batch.targets.tolist()
    with pytest.raises(ValueError, match=f"{name}: expected shape .4., got .1."):
        replace(sequences[0], **{name: [1.0]})


def test_responses_to_one_prompt_share_it():
    """Prefix and suffix together are prompt and response. Position ids of a suffix continue those
    of the prefix. The prompt occurs once, with the experts of its first response."""
    prompts = [(1, 2, 3, 4), (9,)]
    responses = [[(10,), (11, 12), (13, 14, 15)], [(20, 21), (22,)]]
    sequences = [
        TrainSequence(
            prompt,
            response,
            [0.0] * len(response),
            1.0,
            routed_experts=np.array([*prompt, *response][:-1])[:, None, None] + 100 * number,
        )
        for prompt, answers in zip(prompts, responses, strict=True)
        for number, response in enumerate(answers)
    ]
    totals = batch_totals(sequences, num_responses=5, num_response_tokens=9)
    (batch,) = pack(sequences, totals, PackingSpec(99, 0, 1, multiple_of=5, share_prompts=True))
    padding = (3,)
    assert sorted(batch.prefix_groups) == [(0, 2, 1), padding, (3, 1, 2, 3)]
    tokens, positions = batch.tokens[0].tolist(), batch.position_ids[0].tolist()
    found, start = [], 0
    logit_positions = batch.logit_positions.tolist()
    for prefix, *suffixes in batch.prefix_groups:
        before, start = tokens[start : start + prefix], start + prefix
        assert positions[start - prefix : start] == list(range(prefix))
        for length in suffixes:
            at = [logit_positions.index(p) for p in range(start, start + length)]
            found.append(([*before, *tokens[start : start + length]], batch.targets[at].tolist()))
            assert positions[start : start + length] == list(range(prefix, prefix + length))
            start += length
    expected = [([*s.prompt_ids, *s.response_ids[:-1]], list(s.response_ids)) for s in sequences]
    assert sorted(found) == sorted(expected)
    assert batch.num_tokens == totals.num_tokens
    chosen = batch.routed_experts.flatten().tolist()
    experts = dict(zip(zip(positions, tokens, strict=True), chosen, strict=True))
    # Two tokens of the first prefix, then inner tokens of its responses.
    places = ((0, 1), (2, 3), (4, 11), (4, 13), (5, 14))
    assert [experts[place] for place in places] == [1, 3, 111, 213, 214]
    # The last token of a prompt occurs once for each response; the last token of a response does
    # not occur.
    first, second = [1, 2, 3] + [4, 104, 204] + [111, 213, 214], [9, 109, 20]
    assert sorted(chosen) == sorted([-1] * 3 + first + second)


def test_sampling_masks_select_trained_tokens():
    """A mask must have every trained token; those of other tokens are not packed."""
    (sequence,) = make_sequences([(1, 4)])  # responses 2, 3, 4, 5; two ids are kept for 3 and 5
    mask = [False, True, True, False]
    ((batch,),) = pack_ranks([replace(sequence, loss_mask=mask)], 1, max_tokens=99)
    assert batch.sampling_mask.tolist() == [[0, 0, 1], [3, 1003, 4]]
    with pytest.raises(ValueError, match="expected every trained token among the ids kept"):
        replace(sequence, response_ids=[2, 7, 4, 5])
    replace(sequence, response_ids=[7, 3, 4, 5], loss_mask=mask)  # 7 is not trained
    with pytest.raises(ValueError, match=r"sampling_mask: expected shape \[4\], got \[3\]"):
        replace(sequence, sampling_mask=sequence.sampling_mask[:3])
    with pytest.raises(ValueError, match="SamplingMask: expected 3 ids, got 2"):
        SamplingMask([1, 2], [1, 2])
    with pytest.raises(
        ValueError, match="sampling_mask of all sequences or of none, got .* 1 of 2"
    ):
        pack_ranks([sequence, replace(sequence, sampling_mask=None)], 1, max_tokens=99)


def test_experts_of_missing_tokens_or_sequences_raise():
    (sequence,) = make_sequences([(3, 2)])
    with pytest.raises(
        ValueError, match=r"expected routed_experts \[4, layers, top_k\].*got \[5, 1, 1\]"
    ):
        replace(sequence, routed_experts=np.zeros((5, 1, 1), np.uint8))
    with pytest.raises(
        ValueError, match="expected routed_experts of all sequences or of none, got those of 1 of 2"
    ):
        pack_ranks([sequence, replace(sequence, routed_experts=None)], 1, max_tokens=99)


def hidden_states(batch: MicroBatch) -> torch.Tensor:
    """Model output whose hidden states are the token ids: ``[length, rows]`` flattened."""
    return batch.tokens.t().flatten()


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("context_parallel_size", [1, 2, 4])
@QUICK
@given(sizes=SIZES, multiple_of=st.sampled_from([1, 2, 3]), uniform=st.booleans())
def test_slices_and_rows_predict_every_token_once(
    padded, context_parallel_size, sizes, multiple_of, uniform
):
    """All context-parallel ranks together predict each response token once, from the token before
    it, with the experts of that token and the ids that were kept for it.
    """
    sequences = make_sequences(sizes)
    slices = [
        pack_ranks(
            sequences, 1, max_tokens=30, multiple_of=multiple_of, padded=padded, uniform=uniform,
            context_parallel_rank=rank, context_parallel_size=context_parallel_size,
        )[0]
        for rank in range(context_parallel_size)
    ]  # fmt: skip
    predicted, routed = [], []
    for parts in zip(*slices, strict=True):
        total = int(parts[0].lengths.sum())
        local = [
            torch.arange(total) if part.local_tokens is None else part.local_tokens
            for part in parts
        ]
        assert sorted(torch.cat(local).tolist()) == list(range(total))
        for part in parts:
            assert part.tokens.size(1) % multiple_of == 0 and part.tokens.size(1) == parts[
                0
            ].tokens.size(1)
            before = hidden_states(part)[part.logit_positions]
            assert (before + 1 == part.targets).all()  # make_sequences counts up
            torch.testing.assert_close(part.rollout_logprob, -part.targets / 1000)
            predicted += part.targets.tolist()
            kept = [[t, t + 1000][: 1 + t % 2] for t in part.targets.tolist()]
            cells = [[row, t] for row, each in enumerate(kept) for t in each]
            assert cells == ([] if not kept else part.sampling_mask.t().tolist())
            if part.routed_experts is not None:
                experts = part.routed_experts.flatten()
                assert (experts == hidden_states(part).where(experts >= 0, -1)).all()
                routed += experts[experts >= 0].tolist()
    assert sorted(routed) == sorted(
        t for s in sequences for t in [*s.prompt_ids, *s.response_ids][:-1]
    )
    assert sorted(predicted) == sorted(t for s in sequences for t in s.response_ids)
    count = sum(part.num_tokens for parts in slices for part in parts)
    assert count == sum(s.num_tokens for s in sequences)
    if uniform:
        assert len({part.tokens.shape for parts in slices for part in parts}) == 1


def test_context_parallel_rank_has_two_chunks_of_each_sequence():
    """A chunk has three tokens: rank 0 gets the first and the last of four."""
    ((batch,),) = pack_ranks(
        make_sequences([(4, 8)]), 1, max_tokens=99, context_parallel_rank=0, context_parallel_size=2
    )
    assert batch.tokens.tolist() == [[1, 2, 3, 10, 11, 12]] and batch.cu_seqlens.tolist() == [0, 12]


def test_number_of_micro_batches_is_padded_to_a_multiple():
    (batches,) = pack_ranks(make_sequences([(2, 3)] * 3), 1, max_tokens=5, count_multiple_of=2)
    assert [len(batch.lengths) for batch in batches] == [1, 1, 1, 0]


def test_padded_rows_stay_within_the_budget():
    (batches,) = pack_ranks(make_sequences([(2, 8), (2, 1), (2, 1)]), 1, max_tokens=20, padded=True)
    assert [tuple(batch.tokens.shape) for batch in batches] == [(2, 10), (1, 3)]


def test_each_response_to_a_shared_prompt_counts_as_a_sequence():
    sequences = [TrainSequence((p,), (r,), [0.0], 1.0) for p in (1, 2) for r in (3, 4)]
    spec = PackingSpec(99, 0, 1, max_sequences=3, share_prompts=True)
    batches = pack(sequences, batch_totals(sequences, num_responses=4, num_response_tokens=4), spec)
    assert [len(batch.lengths) for batch in batches] == [2, 2]


@QUICK
@given(
    sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 30)), min_size=1, max_size=12),
    max_tokens=st.integers(1, 60),
    max_sequences=st.one_of(st.none(), st.integers(1, 3)),
    layout=st.sampled_from([{"share_prompts": True}, {"padded": True, "uniform": True}]),
)
def test_every_layout_keeps_the_limits(sizes, max_tokens, max_sequences, layout):
    """Shared prompts and rows of one shape. Only a sequence of its own may be longer."""
    sequences = [TrainSequence([p] * 5, [1] * n, [0.0] * n, 1.0) for p, n in sizes]
    (batches,) = pack_ranks(
        sequences, 1, max_tokens=max_tokens, max_sequences=max_sequences, **layout
    )
    assert sum(batch.num_tokens for batch in batches) == sum(s.num_tokens for s in sequences)
    for batch in batches:
        assert batch.tokens.numel() <= max_tokens or len(batch.lengths) == 1
        assert max_sequences is None or len(batch.lengths) <= max_sequences


def test_padding_has_valid_ids_and_positions(monkeypatch):
    """Whatever was in the memory before."""
    monkeypatch.setattr(np, "empty", lambda shape, dtype: np.full(shape, -7, dtype))
    for layout in ({"padded": True}, {"multiple_of": 8}, {"context_parallel_size": 2}):
        ((batch,),) = pack_ranks(make_sequences([(2, 3), (1, 2)]), 1, max_tokens=30, **layout)
        assert (batch.tokens >= 0).all() and (batch.position_ids >= 0).all(), layout


@pytest.mark.parametrize("options", [{"padded": True}, {"context_parallel_size": 2}])
def test_shared_prompts_raise_with_padding_or_context_parallelism(options):
    with pytest.raises(ValueError, match="share_prompts: expected false"):
        pack_ranks(make_sequences([(2, 3)]), 1, max_tokens=5, share_prompts=True, **options)
