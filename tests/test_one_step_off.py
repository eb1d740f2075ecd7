"""One-step-off rollouts: the next batch is sampled while this one is trained; the data stay the same, whatever happens in between."""

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_espo.collect import Collector
from megatron_espo.config import Algorithm, Config, Data, Eval, Model, Rollout, Run, load_config
from megatron_espo.errors import InputError
from megatron_espo.lengths import LengthEstimates
from megatron_espo.progress import Phases
from megatron_espo.rollout import EngineError
from megatron_espo.rollout_log import RolloutLog
from megatron_espo.sampling import Sampler
from megatron_espo.stopping import Stopped
from tests.distributed import ROOT
from tests.faults.runs import Runs, environment
from tests.test_dynamic_sampling import FakeRewards, make_sample
from tests.tiny import save_tiny_model, write_tiny_run

STEPS, PROMPTS, GROUP = 5, 4, 2


# -- the collector, with an engine of a few lines --------------------------------------------------------------------


class Numbers:
    """A prompt stream: 0, 1, 2, ..."""

    def __init__(self):
        self.position = 0

    def take(self, n):
        self.position += n
        return list(range(self.position - n, self.position))

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class FakeEngine:
    """Notes its calls, one at a time; ``befalls`` maps a call's number to what it raises."""

    def __init__(self, befalls=None):
        self.calls, self.befalls, self.busy, self.version = [], befalls or {}, False, 0

    def generate(self, prompts, group_size, *, seed, on_progress, sampling=None):
        assert not self.busy, "two calls at once"
        self.busy = True
        time.sleep(0.05)
        on_progress(0, 1)
        self.busy = False
        self.calls.append((self.version, list(prompts)))
        if error := self.befalls.get(len(self.calls)):
            raise error
        return [[replace(make_sample(p), policy_version=self.version)] * group_size for p in prompts]

    def close(self):
        pass


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_collector(tmp_path, engine, **rollout) -> Collector:
    stop = SimpleNamespace(reason=None)

    def check():
        if stop.reason:
            raise Stopped(stop.reason)

    stop.check = check
    config = Config(
        run=Run(dir=str(tmp_path), steps=STEPS),
        model=Model(path="none"),
        algorithm=Algorithm(rollout_correction="token"),
        rollout=Rollout(prompts_per_step=PROMPTS, group_size=GROUP, max_staleness=1, **rollout),
        data=Data(prompts="reasoning_gym:none"),
        eval=Eval(prompts="reasoning_gym:none", every=1),
    )
    made = Collector(config, {}, SimpleNamespace(is_main=False, rank=1, world_size=1), stop)  # as another rank's, which has nothing; then given all
    made.runtime = SimpleNamespace(is_main=True)
    made._log, made._stream, made._fleet = RolloutLog(tmp_path / "rollouts", {}), Numbers(), engine
    rewards = FakeRewards(lambda items, on_progress: [float(i % 2) for i in range(len(items))])
    made._sampler = Sampler(config, made._stream, engine, rewards, made._polling)
    return made


def loop(collector, engine, recover=lambda: None, disconnect=lambda: None):
    """What ``train`` does; yields each step's prompts and the stream's state that a checkpoint would hold."""
    phases = Phases(draw=False)
    for step in range(1, STEPS + 1):
        groups = collector.collect(step, phases, recover)
        collector.sample_ahead(step + 1)
        collector.settle(step, phases, disconnect)
        assert not engine.busy
        engine.version = step
        yield [int(group[0].prompt.id) for group in groups.rollouts], collector.state_dict()


IN_ORDER = [list(range(PROMPTS * i, PROMPTS * (i + 1))) for i in range(STEPS)]


def test_the_next_batch_is_sampled_with_the_version_before(tmp_path, one_rank):
    engine = FakeEngine()
    seen = list(loop(make_collector(tmp_path, engine), engine))
    assert [prompts for prompts, _ in seen] == IN_ORDER
    assert engine.calls == list(zip([0, 0, 1, 2, 3], IN_ORDER, strict=True))
    # What is in flight is not trained: a checkpoint's stream stands before it.
    assert [state["position"] for _, state in seen] == [PROMPTS * (i + 1) for i in range(STEPS)]


def test_an_engine_that_fails_in_the_background_is_replaced_before_the_sync(tmp_path, one_rank, capsys):
    engine, disconnected = FakeEngine({3: EngineError("it broke")}), []
    seen = list(loop(make_collector(tmp_path, engine), engine, disconnect=lambda: disconnected.append(engine.version)))
    assert [prompts for prompts, _ in seen] == IN_ORDER
    # The third batch is sampled again, by the engine that has the new weights.
    assert engine.calls == list(zip([0, 0, 1, 2, 2, 3], [*IN_ORDER[:3], *IN_ORDER[2:]], strict=True))
    assert disconnected == [1] and "it broke" in capsys.readouterr().out


def test_without_restarts_the_failure_ends_the_run(tmp_path, one_rank):
    engine = FakeEngine({2: EngineError("it broke")})
    with pytest.raises(EngineError, match="it broke"):
        list(loop(make_collector(tmp_path, engine, max_restarts=0), engine))


def test_a_stop_request_gives_up_what_is_in_flight(tmp_path, one_rank):
    engine = FakeEngine()
    collector, phases = make_collector(tmp_path, engine), Phases(draw=False)
    collector.collect(1, phases, lambda: None)
    collector.sample_ahead(2)
    collector._stop.reason = "a STOP file"
    with pytest.raises(Stopped):
        collector.settle(1, phases, lambda: None)
    assert collector.state_dict() == {"position": PROMPTS}
    assert collector.evaluate(1, phases, lambda: None) == {}, "no engine is left to ask"


def test_a_closing_run_does_not_wait_for_the_batch(tmp_path, one_rank):
    engine = FakeEngine()
    collector = make_collector(tmp_path, engine)
    collector.sample_ahead(1)
    collector.close()
    assert engine.calls == [] and collector.state_dict() == {"position": 0}


def test_resumed_batches_are_taken_from_the_log(tmp_path, one_rank):
    """A run that ended after step 2 was saved, and the third batch sampled: it is not sampled again."""
    engine = FakeEngine()
    saved = [state for _, state in zip(range(2), (state for _, state in loop(make_collector(tmp_path, engine), engine)), strict=False)]
    again = FakeEngine()
    collector = make_collector(tmp_path, again)
    collector.load_state_dict(saved[-1], 2)
    groups = collector.collect(3, Phases(draw=False), lambda: None)
    assert [int(group[0].prompt.id) for group in groups.rollouts] == IN_ORDER[2] and again.calls == []
    assert groups.staleness(3) == 1


# -- whole runs on a tiny model, with vLLM -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_step_off")
    save_tiny_model(folder / "model")
    write_tiny_run(
        folder,
        run={"steps": STEPS, "checkpoint_every": 2, "keep_rollouts": True},
        algorithm={"rollout_correction": "token"},
        rollout={"prompts_per_step": PROMPTS, "group_size": GROUP, "max_staleness": 1},
    )
    return folder


def run(folder, name: str, *overrides: str, ranks: int = 1, fault: str | None = None) -> str:
    done = Runs(folder, STEPS).train(name, *overrides, ranks=ranks, fault=fault)
    assert done.returncode == 0 or fault, done.stdout + done.stderr
    return done.stdout


def launch(folder, name: str) -> subprocess.Popen:
    """A run under way, whose first step is done."""
    runs = Runs(folder, STEPS)
    command = runs.command(name, ranks=1)
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    runs.wait_for_step(process, name, 1)
    return process


def recorded(folder, name: str) -> list:
    log = RolloutLog(folder / name / "rollouts", {})
    return [log.read(step, None).groups for step in range(1, STEPS + 1)]


def lines(folder, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def assert_whole(folder, name: str) -> None:
    """Every step once, every prompt of the stream once and in order, and the same weights from the recorded rollouts, bit for bit."""
    found = lines(folder, name)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert found[-1]["ledger/trained"] == found[-1]["ledger/dispatched"] == PROMPTS * STEPS
    assert prompts(folder, name) == prompts(folder, "synchronous")
    run(folder, f"{name}-again", f"run.replay={folder / name / 'rollouts'}")
    one, other = (Runs(folder, STEPS).weights(which) for which in (name, f"{name}-again"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def prompts(folder, name: str) -> list[list[str]]:
    return [[group[0].prompt.id for group in groups.rollouts] for groups in recorded(folder, name)]


@pytest.fixture(scope="module")
def synchronous(folder):
    """With a learning rate that moves no weight: what is sampled does not depend on when."""
    run(folder, "synchronous", "rollout.max_staleness=0", "optimizer.lr=1e-30", ranks=2)


SWITCHES = {
    "staleness": ["rollout.max_staleness=1"],
    "longest_first": ["rollout.max_staleness=0", "rollout.longest_first=true"],
    "overlap": ["rollout.max_staleness=0", "reward.overlap=true"],
    "all": ["rollout.max_staleness=1", "rollout.longest_first=true", "reward.overlap=true"],
}


@pytest.mark.parametrize("which", [pytest.param(which, marks=() if which == "all" else pytest.mark.slow) for which in SWITCHES])
def test_the_same_data_are_trained(folder, synchronous, which):
    """Five steps of four prompts out of nine: the second and third epochs have lengths to order by."""
    run(folder, which, "optimizer.lr=1e-30", *SWITCHES[which], ranks=2)
    ahead = "rollout.max_staleness=1" in SWITCHES[which]
    for step, (one, other) in enumerate(zip(recorded(folder, which), recorded(folder, "synchronous"), strict=True), 1):
        assert torch.equal(one.rewards, other.rewards)
        for a, b in zip(sum(one.rollouts, []), sum(other.rollouts, []), strict=True):
            assert replace(a, policy_version=0) == replace(b, policy_version=0)
            assert (a.policy_version, b.policy_version) == (max(0, step - 1 - ahead), step - 1)
    assert [line["rollout/staleness"] for line in lines(folder, which)] == [0, *[ahead] * (STEPS - 1)]
    assert [line["rollout/staleness"] for line in lines(folder, "synchronous")] == [0] * STEPS


def test_order_of_the_longest_first():
    estimates = LengthEstimates()
    prompts = [make_sample(number).prompt for number in range(5)]
    estimates.learn([[make_sample(0, 2), make_sample(0, 4)], [make_sample(1, 5)], [make_sample(3, 3)], [make_sample(4, 1)]])
    assert estimates.longest_first(prompts) == [2, 1, 0, 3, 4], "never sampled, 5, 3, 3, 1 tokens"


@pytest.mark.slow
def test_what_was_recorded_gives_the_same_weights(folder, synchronous):
    run(folder, "moving")
    assert_whole(folder, "moving")
    gaps = [line["mismatch/logprob_gap_mean"] for line in lines(folder, "moving") if line["rollout/with_advantage"]]
    assert max(gaps) > 1e-3, "rollouts of older weights"


@pytest.mark.slow
def test_a_killed_run_goes_on(folder, synchronous):
    """Rank 0 dies while it trains the fourth batch and samples the fifth; the third was trained since the checkpoint."""
    run(folder, "killed", fault="backward:0:4:kill")
    run(folder, "killed")
    assert_whole(folder, "killed")


@pytest.mark.slow
def test_a_stopped_run_goes_on(folder, synchronous):
    process = launch(folder, "stopped")
    (folder / "stopped" / "STOP").touch()
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and "restarting the rollout engine" not in output, output
    assert len(lines(folder, "stopped")) < STEPS
    run(folder, "stopped")
    assert_whole(folder, "stopped")


@pytest.mark.slow
def test_a_killed_engine_is_replaced(folder, synchronous):
    process = launch(folder, "engine")
    (rank,) = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    children = subprocess.run(["pgrep", "-P", rank, "-f", "rollout.server"], capture_output=True, text=True).stdout.split()
    os.kill(int(children[0]), signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0 and "restarting the rollout engine" in output, output
    assert_whole(folder, "engine")


def test_it_needs_the_correction(folder):
    with pytest.raises(InputError, match="rollout_correction: expected token or sequence with rollout.max_staleness 1"):
        load_config(str(folder / "run.yaml"), ["run.dir=x", "algorithm.rollout_correction=metrics"])
