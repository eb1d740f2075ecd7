"""``rollout.max_staleness``: prompts in flight across steps are trained once and in time."""

import asyncio
import os
import random
import signal
import subprocess
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_espo.config import Rollout, load_config
from megatron_espo.data.rollout_store import RolloutLog
from megatron_espo.distributed.stop_request import Stopped
from megatron_espo.errors import InputError
from megatron_espo.files import read_jsonl
from megatron_espo.rollout.engine import EngineError
from megatron_espo.trainer.ledger import Ledger
from megatron_espo.types import Prompt
from tests.faults.runs import Runs, environment
from tests.support.distributed import ROOT
from tests.support.fake_engine import FakeRun, prompt_ids
from tests.support.tiny import save_tiny_model, write_tiny_run

# -- the sampler with fakes --

STEPS, GROUP = 7, 2


def judge(prompt: Prompt, text: str) -> float:
    return float(len(text) // 2 % 2)


def make_rollout(**changes) -> Rollout:
    return Rollout(prompts_per_step=3, group_size=GROUP, max_response_tokens=6, **changes)


@st.composite
def rollouts(draw) -> Rollout:
    prompts, staleness = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    over = draw(st.none() | st.integers(1, staleness * prompts)) if staleness else None
    return Rollout(
        prompts_per_step=prompts,
        group_size=GROUP,
        max_response_tokens=6,
        max_staleness=staleness,
        over_sampling_prompts=over,
        max_resampling_rounds=draw(st.integers(0, 2)),
    )


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(rollout=rollouts(), seed=st.integers(0, 2**31), faults=st.sampled_from([0.0, 0.1, 0.4]))
def test_each_prompt_is_trained_once_and_in_time(rollout, seed, faults):
    """For any order of responses, engine failures, and restarts after a step."""
    chance = random.Random(seed)

    def check() -> None:
        if chance.random() < faults:
            raise EngineError("now")

    def launch(state: dict | None) -> FakeRun:
        run = FakeRun(rollout, judge, order=lambda ids, number: hash((seed, number)), check=check)
        if state:
            run.sampler.load_state_dict(state)
        return run

    ledger, state, trained, run = (
        Ledger(),
        {"stream": {"position": 0}, "pending": []},
        Counter(),
        launch(None),
    )
    try:
        for step in range(1, STEPS + 1):
            started = {entry["id"]: entry["start_step"] for entry in state["pending"]}
            while True:
                try:
                    groups = run.batch(step)
                    break
                except EngineError:
                    assert run.state() == state, "a batch that is not complete is not committed"
            state = run.state()
            ledger.count(groups)
            assert len(groups.rollouts) == rollout.prompts_per_step
            pending = [entry["id"] for entry in state["pending"]]
            assert len(pending) == groups.in_flight == ledger.in_flight == rollout.ahead
            assert all(
                entry["start_step"] > step - rollout.max_staleness for entry in state["pending"]
            )
            assert groups.max_staleness(step) <= rollout.max_staleness
            for group, rewards in zip(groups.rollouts, groups.rewards.tolist(), strict=True):
                trained[group[0].prompt.id] += 1
                assert step - started.get(group[0].prompt.id, step) <= rollout.max_staleness
                assert rewards == [judge(sample.prompt, sample.text) for sample in group]
                assert (
                    all(sample.prompt is group[0].prompt for sample in group)
                    and len(group) == GROUP
                )
            dispatched = {str(number) for number in range(state["stream"]["position"])}
            dropped = dispatched - set(trained) - set(pending)
            assert set(trained.values()) == {1} and not set(trained) & set(pending)
            assert ledger == Ledger(len(dispatched), len(trained), len(dropped), len(pending))
            assert rollout.max_resampling_rounds or not dropped
            if chance.random() < 0.3:
                run.close()
                run = launch(state)
    finally:
        run.close()


def test_oldest_first_and_due_prompts_are_waited_for():
    polls = 0

    def check() -> None:
        nonlocal polls
        polls += 1
        if polls == 3:
            run.source.held.clear()

    with FakeRun(make_rollout(max_staleness=2), judge, check=check) as run:
        run.source.held = {0, 4}
        polls = -(10**9)
        assert prompt_ids(run.batch(1)) == [1, 2, 3]
        assert prompt_ids(run.batch(2)) == [5, 6, 7], "those of step 1 come before those of step 2"
        polls = 0
        # 0 and 4 of the step 1 must be trained in step 3. Others that finished wait.
        found = prompt_ids(run.batch(3))
        assert polls >= 3 and found == [0, 4, 8]
        assert prompt_ids(run.batch(4)) == [9, 10, 11]


def test_a_due_prompt_does_not_make_later_ones_late():
    """Six prompts are due by step 3: steps 2 and 3 must take three each."""
    with FakeRun(make_rollout(max_staleness=2), judge, order=lambda ids, seed: -ids[0]) as run:
        for step in range(1, 8):
            run.batch(step)
            starts = Counter(entry["start_step"] for entry in run.state()["pending"])
            for later in range(1, 3):
                due = sum(count for start, count in starts.items() if start + 2 <= step + later)
                assert due <= 3 * later


def test_prompts_that_were_in_flight_are_sampled_again_with_their_seeds():
    def responses(groups):
        return {(s.prompt.id, s.text) for group in groups.rollouts for s in group}

    with FakeRun(make_rollout(max_staleness=1), judge) as run:
        run.source.held = {0, 1, 2}
        run.batch(1)
        state = run.state()
        run.source.held = set()
        expected = responses(run.batch(2))
    with FakeRun(make_rollout(max_staleness=1), judge) as again:
        again.sampler.load_state_dict(state)
        found = again.batch(2)
    assert prompt_ids(found) == [0, 1, 2] and responses(found) == expected
    assert found.staleness(2) == 0, "sampled again with the newer weights"


@pytest.mark.parametrize("rounds", [0, 2])
@pytest.mark.parametrize("before", [1, 3])
def test_a_lower_limit_holds_for_prompts_in_flight(before, rounds):
    """They wait for their step, so that newer weights sample them."""
    with FakeRun(make_rollout(max_staleness=before), judge) as run:
        for step in (1, 2):
            run.batch(step)
        state = run.state()
    assert len(state["pending"]) == 3 * before
    with FakeRun(make_rollout(max_resampling_rounds=rounds), judge) as resumed:
        resumed.sampler.load_state_dict(state)
        trained = []
        for step in range(3, 8):
            groups = resumed.batch(step)
            assert groups.max_staleness(step) == 0
            trained += prompt_ids(groups)
    assert len(set(trained)) == len(trained)


def test_a_stop_keeps_the_state_of_the_last_batch():
    def check() -> None:
        if stop:
            raise Stopped("a STOP file")

    stop = False
    with FakeRun(make_rollout(max_staleness=1), judge, check=check) as run:
        run.batch(1)
        before, stop = run.state(), True
        with pytest.raises(Stopped):
            run.batch(2)
        assert run.state() == before


def test_staleness_is_of_each_token():
    """Tokens that were sampled before and after a weight update."""
    with FakeRun(make_rollout(max_staleness=2), judge) as run:
        run.source.held = {0, 1, 2}
        run.batch(1)
        run.source.held = set()
        groups = run.batch(2)
    samples = [sample for group in groups.rollouts for sample in group]
    assert prompt_ids(groups) == [0, 1, 2]
    for sample in samples:
        half = len(sample.versions) // 2
        assert sample.versions.tolist() == [0] * half + [1] * (len(sample.versions) - half)
    ages = np.concatenate([1 - sample.versions for sample in samples])
    assert 0 < ages.mean() < 1
    assert groups.staleness(2) == pytest.approx(ages.mean()) and groups.max_staleness(2) == 1


def test_an_aborted_response_goes_on_from_its_tokens():
    with FakeRun(make_rollout(), judge) as run:
        prompt = run.stream.take(1)[0]
        (future,) = run.runner.start(prompt, "0", run.sampler._sampling, [5])
        while not run.source.requests:
            run.loop.run(asyncio.sleep(0.001))
        run.source.version = 3
        run.loop.run(run.source.abort_all())
        with run.source.release():
            found = future.result(10)
    first, *rest = run.source.requests
    assert first == prompt.token_ids and rest, "the abort has an answer of some tokens"
    kept = rest[-1][len(first) :]
    assert tuple(found.response_ids[: len(kept)]) == kept
    assert found.versions.tolist() == [0] * len(kept) + [3] * (len(found.versions) - len(kept))
    assert found.finish_reason == ("stop" if found.response_ids[-1] == 2 else "length")


# -- runs of a tiny model with vLLM --

RUN_STEPS, PROMPTS, STALENESS = 6, 4, 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("staleness")
    save_tiny_model(folder / "model")
    write_tiny_run(
        folder,
        run={"steps": RUN_STEPS, "checkpoint_every": 2, "keep_rollouts": True},
        algorithm={"rollout_correction": "token"},
        rollout={
            "prompts_per_step": PROMPTS,
            "group_size": GROUP,
            "max_response_tokens": 24,
            "max_staleness": STALENESS,
            "engine_args": {"kv_cache_memory_bytes": 1 << 28},
        },
    )
    return Runs(folder, RUN_STEPS)


def train(runs: Runs, name: str, *overrides: str, ranks: int = 1) -> list[dict]:
    """Train and return the metrics."""
    done = runs.train(name, *overrides, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return metrics(runs, name)


def metrics(runs: Runs, name: str) -> list[dict]:
    return read_jsonl(runs.folder / name / "metrics.jsonl")


def start(command: list[str]) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, **pipes)


def children(pid: int, *options: str) -> list[int]:
    command = ["pgrep", "-P", str(pid), *options]
    found = subprocess.run(command, capture_output=True, text=True)
    return [int(child) for child in found.stdout.split()]


def assert_whole(runs: Runs, name: str) -> None:
    """Every step once, each prompt trained once or in flight, no token too old."""
    lines = metrics(runs, name)
    assert [line["step"] for line in lines] == list(range(1, RUN_STEPS + 1))
    log = RolloutLog(runs.folder / name / "rollouts", {})
    recorded = [log.read(step, None) for step in range(1, RUN_STEPS + 1)]
    assert all(line["rollout/staleness_max"] <= STALENESS for line in lines)
    assert all(
        groups.max_staleness(step) <= STALENESS for step, (groups, _) in enumerate(recorded, 1)
    )
    trained = Counter(prompt for groups, _ in recorded for prompt in ids_of(groups))
    _, after = recorded[-1]
    pending = Counter(entry["id"] for entry in after["pending"])
    # 24 trained and 8 in flight are the first 32 of a stream that repeats its 9 rows.
    assert trained.total() == PROMPTS * RUN_STEPS and pending.total() == PROMPTS * STALENESS
    assert sorted((trained + pending).values()) == [3] * 4 + [4] * 5
    (stream,) = after["stream"].values()
    assert stream["epoch"] == 3 and stream["position"] == 5
    expected = {"dispatched": 32, "trained": 24, "dropped_equal": 0, "in_flight": 8}
    assert {key: lines[-1][f"ledger/{key}"] for key in expected} == expected


def ids_of(groups) -> list[str]:
    return [group[0].prompt.id for group in groups.rollouts]


def assert_same_weights(runs: Runs, name: str, other: str) -> None:
    one, two = runs.weights(name), runs.weights(other)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
def test_a_run_with_weight_updates_in_flight(runs):
    """A replay of its rollouts ends with the weights of the run, bit for bit."""
    train(runs, "stale", ranks=2)
    assert_whole(runs, "stale")
    log = RolloutLog(runs.folder / "stale" / "rollouts", {})
    recorded = [log.read(step, None)[0] for step in range(1, RUN_STEPS + 1)]
    assert max(groups.max_staleness(step) for step, groups in enumerate(recorded, 1)) >= 1
    train(runs, "again", f"run.replay={runs.folder / 'stale' / 'rollouts'}", ranks=2)
    assert_same_weights(runs, "stale", "again")


@pytest.mark.slow
def test_the_trainer_measures_the_log_probs_that_the_engine_reports(runs):
    """With constant weights, a weight update in flight does not change log-probs."""
    lines = train(runs, "still", "optimizer.lr=1e-30")
    assert_whole(runs, "still")
    gaps = [line.get("mismatch/logprob_gap_max", 0.0) for line in lines]
    assert 0 < max(gaps) < 1e-4


@pytest.mark.slow
def test_a_killed_run_trains_each_prompt_once(runs):
    """SIGKILL between two checkpoints, then the same command."""
    process = start(runs.command("killed", ranks=1))
    runs.wait_for_step(process, "killed", 3)
    (rank,) = children(process.pid)
    os.kill(rank, signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode != 0 and len(metrics(runs, "killed")) < RUN_STEPS
    runs.assert_no_orphans("killed")
    train(runs, "killed")
    assert_whole(runs, "killed")
    train(runs, "killed, again", f"run.replay={runs.folder / 'killed' / 'rollouts'}")
    assert_same_weights(runs, "killed", "killed, again")


@pytest.mark.slow
def test_a_killed_engine_is_replaced(runs):
    process = start(runs.command("engine", ranks=1))
    runs.wait_for_step(process, "engine", 2)
    (rank,) = children(process.pid)
    os.kill(children(rank, "-f", "vllm.entrypoints")[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    # The failure occurs while a step waits for responses, or in a weight update.
    assert "restarting the rollout engine" in output or any(
        line.get("sync/restarts") for line in metrics(runs, "engine")
    )
    assert_whole(runs, "engine")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["algorithm.rollout_correction=metrics"],
            "rollout_correction: expected token, sequence or geometric with rollout.max_stale",
        ),
        (
            ["rollout.over_sampling_prompts=9"],
            "over_sampling_prompts: expected at most max_staleness x prompts_per_step = 8",
        ),
        (
            ["rollout.max_staleness=0", "rollout.over_sampling_prompts=1"],
            "over_sampling_prompts: expected at most max_staleness x prompts_per_step = 0",
        ),
    ],
)
def test_settings_that_exclude_each_other(overrides, message):
    base = ["rollout.max_staleness=2", "algorithm.rollout_correction=token"]
    base += ["rollout.prompts_per_step=4", "run.dir=x"]
    with pytest.raises(InputError, match=message):
        load_config(str(ROOT / "examples" / "quickstart.yaml"), [*base, *overrides])
