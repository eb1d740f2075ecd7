"""Partial rollouts: a step ends before its longest response does; with vLLM, on a tiny model. Bookkeeping under failures: ``test_ledger.py``."""

import json

import pytest
import torch

from megatron_espo.config import load_config
from megatron_espo.errors import InputError
from megatron_espo.rollout.requests import Countdown, Enough, Request
from megatron_espo.rollout_log import RolloutLog
from tests.faults.runs import Runs
from tests.tiny import save_tiny_model, write_tiny_run

STEPS, PROMPTS, GROUP, EXTRA, TOKENS = 5, 4, 2, 2, 24


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("partial")
    save_tiny_model(folder / "model")
    partial = {"extra_prompts": EXTRA, "max_carried_steps": 2}
    write_tiny_run(
        folder,
        run={"steps": STEPS, "checkpoint_every": 2, "keep_rollouts": True},
        algorithm={"rollout_correction": "token"},
        rollout={"prompts_per_step": PROMPTS, "group_size": GROUP, "max_response_tokens": TOKENS} | partial,
    )
    return Runs(folder, STEPS)


def run(runs, name: str, *overrides: str, ranks: int = 1, fault: str | None = None) -> list[dict]:
    """The metrics of one launch."""
    done = runs.train(name, *overrides, ranks=ranks, fault=fault)
    assert done.returncode == 0 or fault, done.stdout + done.stderr
    return [json.loads(line) for line in (runs.folder / name / "metrics.jsonl").read_text().splitlines()]


def assert_whole(runs, name: str, oldest: int) -> list:
    """Each prompt of the stream is trained once or in flight, each response whole and not too old; returns the recorded steps."""
    log = RolloutLog(runs.folder / name / "rollouts", {})
    recorded = [log.read(step, None) for step in range(1, STEPS + 1)]
    trained = [group for found in recorded for group in found.groups.rollouts]
    left = [entry.rollouts for entry in recorded[-1].in_flight]
    assert [len(found.groups.rollouts) for found in recorded] == [PROMPTS] * STEPS and len(left) == EXTRA
    asked = sorted(group[0].prompt.id for group in trained + left)
    order = [group[0].prompt.id for group in trained + left]
    first_epoch = sorted(dict.fromkeys(order))
    assert len(asked) == PROMPTS * STEPS + EXTRA == 22 and len(first_epoch) == 9
    assert all(asked.count(prompt) in (2, 3) for prompt in first_epoch), "22 prompts of an epoch of 9"
    for step, found in enumerate(recorded, 1):
        for sample in sum(found.groups.rollouts, []):
            assert sample.finish_reason == ("stop" if sample.response_ids[-1] == 2 else "length") and len(sample.response_ids) <= TOKENS
            assert step - 1 - oldest <= sample.policy_version < step
    return recorded


@pytest.mark.parametrize("way", [["rollout.max_staleness=0"], pytest.param(["rollout.max_staleness=1", "rollout.longest_first=true"], marks=pytest.mark.slow)])
def test_responses_go_on_in_the_next_step(runs, way):
    """With weights that stand still: what a response is made of is told by its versions, and its log-probs by the trainer."""
    name = way[0][-1]
    lines = run(runs, name, "optimizer.lr=1e-30", *way, ranks=2)
    recorded = assert_whole(runs, name, oldest=2 + int(name))
    carried = [sample for step, found in enumerate(recorded, 1) for sample in sum(found.groups.rollouts, []) if sample.policy_version < step - 1 - int(name)]
    assert carried and max(line["mismatch/logprob_gap_max"] for line in lines if "mismatch/logprob_gap_max" in line) < 1e-4
    assert lines[-1]["ledger/dispatched"] == PROMPTS * STEPS + EXTRA and lines[-1]["ledger/in_flight"] == EXTRA
    assert max(line["rollout/staleness"] for line in lines) > int(name)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_what_was_in_flight(runs):
    """Rank 0 dies while it trains the fourth batch, after the checkpoint of step 2; then the recorded rollouts give the same weights."""
    run(runs, "killed", fault="backward:0:4:kill")
    run(runs, "killed")
    assert_whole(runs, "killed", oldest=2)
    run(runs, "again", f"run.replay={runs.folder / 'killed' / 'rollouts'}")
    one, other = runs.weights("killed"), runs.weights("again")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_what_was_in_flight_must_be_there(tmp_path):
    with pytest.raises(InputError, match=r"step_000004.json.gz: expected the responses that were in flight after step 4, found no file"):
        RolloutLog(tmp_path, {}).in_flight_after(4)


def test_countdown():
    requests = [Request((), None, 1, prompt) for prompt in (0, 0, 1, 2)]
    countdown = Countdown(Enough(2, first=1), requests)
    ended = []
    for number in (3, 2, 0, 1):
        countdown.finish(requests[number])
        ended.append(countdown.is_over)
    assert ended == [False, False, False, True], "two prompts are whole, but not the first"
    assert Countdown(Enough(0), requests).is_over and not Countdown(Enough(0, first=1), requests).is_over
    assert [Enough(5, first=3).share(i, 3) for i in range(3)] == [Enough(2, 1), Enough(2, 1), Enough(1, 1)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.rollout_correction=metrics"], "rollout_correction: expected token or sequence with rollout.extra_prompts 2"),
        (["rollout.extra_prompts=5"], r"extra_prompts: expected at most prompts_per_step \(4\)"),
        (["rollout.max_resampling_rounds=1"], "max_resampling_rounds: expected 0 with extra_prompts"),
        (["reward.overlap=true"], "reward.overlap: expected false with rollout.extra_prompts"),
    ],
)
def test_what_does_not_go_together(runs, overrides, message):
    with pytest.raises(InputError, match=message):
        load_config(str(runs.folder / "run.yaml"), ["run.dir=x", *overrides])
