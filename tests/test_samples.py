"""Choice of logged samples, the text of each token, and entropies gathered from all ranks."""

import math

import pytest
import torch
import torch.distributed as dist

from megatron_espo.algo import load_objective
from megatron_espo.config import Algorithm
from megatron_espo.data.packing import PackingSpec, TrainSequence, batch_totals, pack
from megatron_espo.monitoring.entropy import BINS, EntropyRecorder
from megatron_espo.monitoring.samples import choose_samples, sample_record, token_pieces
from megatron_espo.types import Prompt
from tests.support.distributed import ROOT, run_ranks
from tests.support.trajectories import single_turn

VOCAB, NAN = 131, math.nan


def test_prompts_with_differing_rewards_come_first():
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.5], [NAN, 0.2, 0.4], [NAN, NAN, NAN]])
    assert choose_samples(rewards, 4) == [(1, 1), (1, 0), (2, 2), (2, 1)]
    assert choose_samples(rewards, 99) == [(1, 1), (1, 0), (2, 2), (2, 1), (0, 0), (3, 0)]
    assert choose_samples(rewards, 0) == []


@pytest.mark.parametrize("text", ["The answer is 12.", "né 漢字 🙂🙂 \n\n  x", "🙂"])
def test_pieces_of_a_byte_level_tokenizer_make_the_text(text):
    from megatron_espo.data.tokenizer import load_tokenizer

    folder = ROOT / "models" / "SmolLM2-135M-Instruct"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("models/SmolLM2-135M-Instruct is not there (tools/prepare_smollm2.py)")
    tokenizer = load_tokenizer(folder)
    ids = [*tokenizer.encode_prompt(text), min(tokenizer.eos_ids)]
    pieces = token_pieces(ids, tokenizer.decode)
    assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids) == text
    assert pieces[-1] == "" and not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_incomplete_character_at_the_end_is_shown():
    def decode(ids):
        return bytes(ids).decode("utf-8", "replace")

    ids = list("a🙂".encode())
    assert token_pieces(ids, decode) == ["a", "", "", "", "🙂"]
    assert token_pieces(ids[:-1], decode) == ["a", "", "", "\N{REPLACEMENT CHARACTER}"]


def test_a_record_has_a_piece_for_each_token():
    rollout = single_turn(
        Prompt("p", "What?", "4", (1,)), (52, 53), (-1.0, -2.0), 3, "length", "45"
    )
    record = sample_record(7, rollout, 1.0, 0.5, lambda ids: bytes(ids).decode())
    assert record["pieces"] == ["4", "5"] and record["tokens"] == [52, 53] and record["reward"] == 1
    assert (record["step"], record["prompt_id"], record["policy_versions"]) == (7, "p", [3])


LENGTHS = [3, 7, 1, 12, 5]
WATCHED = {1: 0, 3: 1, 9: 2}  # the last one is not trained


def sequences() -> list[TrainSequence]:
    return [
        TrainSequence(
            (1, 2),
            tuple(range(10 * i, 10 * i + length)),
            (-1.0,) * length,
            1.0,
            logged_sample=WATCHED.get(i),
        )
        for i, length in enumerate(LENGTHS)
    ]


def entropies(ids: torch.Tensor) -> torch.Tensor:
    """An entropy for each token id, to recognise tokens after packing."""
    return (ids * 7919 % 97) / 97 * math.log(VOCAB) * 0.99


def record_on_rank() -> dict:
    """Record one data-parallel rank's sequences. The third rank is not a logging rank."""
    objective, rank = load_objective(Algorithm(quantiles=(0.3, 0.8))), dist.get_rank()
    totals = batch_totals(sequences(), num_responses=5, num_response_tokens=sum(LENGTHS))
    recorder = EntropyRecorder(3, VOCAB)
    for _ in range(2):  # the second step must not contain values of the first
        recorder.start_step([LENGTHS[1], LENGTHS[3], 4])
        for batch in pack(sequences(), totals, PackingSpec(12, rank % 2, 2)):
            sizes = {"vocab_size": VOCAB, "num_responses": 5, "num_tokens": sum(LENGTHS)}
            entropy = entropies(batch.targets)
            segments = objective.segment_tokens(entropy, batch.lengths, **sizes)
            if rank < 2:
                recorder.record(batch, segments)
        histogram, tokens = recorder.gather()
    return histogram | {"tokens": tokens}


def test_every_trained_token_is_counted_once_over_ranks():
    found = run_ranks(3, "tests.test_samples:record_on_rank")
    wanted_counts, lowest = [[0] * BINS for _ in range(3)], {1: [], 2: []}
    for i, length in enumerate(LENGTHS):
        values = entropies(torch.arange(10 * i, 10 * i + length)).tolist()
        order = sorted(range(length), key=lambda t: -values[t])
        groups = [
            sum(order.index(t) < math.ceil(round((1 - q) * length, 9)) for q in (0.3, 0.8))
            for t in range(length)
        ]
        for value, group in zip(values, groups, strict=True):
            wanted_counts[group][int(value / math.log(VOCAB) * BINS)] += 1
        for boundary, values_above in lowest.items():
            values_above.append(
                min(v for v, g in zip(values, groups, strict=True) if g >= boundary)
            )
        if i in (1, 3):
            got_values, got_groups = found["tokens"][WATCHED[i]]
            assert got_values == pytest.approx(values) and got_groups == groups
    assert found["counts"] == wanted_counts and found["tokens"][2] is None
    assert found["boundaries"] == pytest.approx([sum(lowest[b]) / 5 for b in (1, 2)])
    assert found["highest"] == pytest.approx(math.log(VOCAB))


def test_a_step_without_training_has_no_boundaries():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        histogram, tokens = EntropyRecorder(2, VOCAB).gather()
    finally:
        dist.destroy_process_group()
    assert histogram["boundaries"] == [None] and sum(map(sum, histogram["counts"])) == 0
    assert tokens == []
