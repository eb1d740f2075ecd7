"""The same command continues a run that was killed, frozen, stopped or damaged.

It ends with the weights of an undisturbed run.
"""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_espo.config import load_config
from megatron_espo.errors import InputError
from megatron_espo.trainer.checkpoints import Checkpoints
from tests.faults.conftest import STEPS
from tests.faults.runs import environment
from tests.support.distributed import ROOT

slow = pytest.mark.slow

FAILED, ENDED = "failed", "requeue"


def died(rank: int, step: int, phase: str = "train") -> str:
    """The report of the other rank when ``rank`` is killed."""
    lost = rf"rank {rank} \(process \d+ on \S+\) has died"
    return rf"{lost}; rank {1 - rank}, step {step}, phase {phase}"


def stuck(rank: int, step: int, reason: str) -> str:
    """The report of the watchdog about ``rank``."""
    return rf"rank {rank} \(.*\) stands still: step {step}, phase train, \d+ s .*{reason}"


CONTINUES, STARTS_AGAIN = ": .*the same command continues", ": .*the same command starts again"
STOPPED_PROCESS, NO_COLLECTIVE = "its process does not run", "inside no collective"
OOM = r"out of memory in the layers: lower megatron.max_tokens_per_micro_batch \(16384\)"
FLIPPED = "RankMismatch: .*weight of .*: expected the same .* on rank 0; .* on rank 1;"
FULL = "No space left on device"
# Regular expression of the terminal's output, and the state in status.json.
FAULTS = {
    "backward:1:1:kill": (died(1, 1) + STARTS_AGAIN, FAILED),
    "backward:1:5:kill": (died(1, 5) + CONTINUES, FAILED),
    "backward:0:4:kill": (died(0, 4) + CONTINUES, FAILED),
    "backward:1:3:freeze": (stuck(1, 3, STOPPED_PROCESS), FAILED),
    "backward:0:4:freeze": (stuck(0, 4, STOPPED_PROCESS), FAILED),
    "backward:1:4:loop": (stuck(1, 4, NO_COLLECTIVE), FAILED),
    "backward:0:5:oom": (f"rank 0, step 5, phase train: .*{OOM}", FAILED),
    # Requests to stop. test_stop_with_engine.py tests them in the phases that need an engine.
    "train:1:4:term": ("", ENDED),
    "sync:0:5:term": ("", ENDED),
    "checkpoint:0:2:term": ("", ENDED),
    "weights:1:4:flip": (f"step 4, phase train: {FLIPPED}", FAILED),
    "save:1:2:full": (f"rank 1 could not write its part: .*{FULL}", FAILED),
    "save:1:4:kill": (died(1, 4, "checkpoint"), FAILED),
    "write:0:4:full": (f"step [56], phase checkpoint: OSError: .*rank 0 could not.*{FULL}", FAILED),
    "rename:0:6:kill": (died(0, 6, "checkpoint"), FAILED),
    "rename:0:6:full": (f"step 6, phase checkpoint: OSError: .*{FULL}", FAILED),
    "latest:0:6:kill": (died(0, 6, "checkpoint"), FAILED),
    "gradient:1:4:raise": ("rank 1, step 4, phase train: RuntimeError: injected at grad", FAILED),
}
# Each chain is one run with one fault in each launch.
CHAINS = {
    "short": "save:1:2:full backward:1:3:freeze weights:1:4:flip backward:0:5:oom sync:0:5:term "
    "latest:0:6:kill",
    "killed": "backward:1:1:kill backward:0:4:kill save:1:4:kill backward:1:5:kill rename:0:6:kill",
    "stopped": "checkpoint:0:2:term backward:1:4:loop write:0:4:full backward:0:4:freeze "
    "gradient:1:4:raise train:1:4:term rename:0:6:full",
}


@slow
@pytest.mark.parametrize("chain", CHAINS)
def test_same_command_continues_after(runs, undisturbed, chain):
    assert set(" ".join(CHAINS.values()).split()) == FAULTS.keys()
    for fault in CHAINS[chain].split():
        line, state = FAULTS[fault]
        done = runs.train(chain, fault=fault, by_torchrun=chain == "killed")
        assert (done.returncode != 0) == (state == FAILED), (fault, done.stdout + done.stderr)
        assert re.search(line, done.stdout + done.stderr), (fault, done.stdout + done.stderr)
        status = runs.status(chain)
        assert status["state"] == state and status["why"], (fault, status)
        if fault.endswith(("freeze", "loop")):
            assert (
                "File" in (runs.folder / chain / "heartbeats" / "rank0.stacks.txt").read_text()
                or ":0:" in fault
            )
    done = runs.train(chain)
    assert done.returncode == 0, done.stdout + done.stderr
    runs.assert_same_end(chain, undisturbed)


@pytest.mark.slow
def test_a_rank_killed_while_its_thread_writes_leaves_the_previous_checkpoint(runs, undisturbed):
    done = runs.train("written", fault="write:1:4:kill", by_torchrun=True)
    assert done.returncode != 0, done.stdout + done.stderr
    folder = runs.folder / "written" / "checkpoints"
    assert (folder / "latest").read_text() == "step_000002\n"
    assert any(file.stat().st_size for file in folder.glob("step_000004.partial/__1_*"))
    done = runs.train("written")
    assert done.returncode == 0 and f"from {folder / 'step_000002'}" in done.stdout, (
        done.stdout + done.stderr
    )
    runs.assert_same_end("written", undisturbed)


WAYS = [
    "STOP",
    *(
        pytest.param(how, marks=slow)
        for how in ("SIGUSR1 to a rank", "SIGTERM to torchrun", "wall clock")
    ),
]


@pytest.mark.parametrize("how", WAYS)
def test_stop_request_saves_and_the_same_command_continues(runs, undisturbed, how):
    run, overrides, fault = how.replace(" ", "-"), [], None
    if how == "wall clock":
        overrides, fault = ["run.max_seconds=4"], "backward:0:2:slow"
    folder = runs.folder / run
    process = subprocess.Popen(
        runs.command(run, *overrides, module="tests.faults.inject"),
        cwd=ROOT,
        env=environment(fault),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    runs.wait_for_step(process, run, 1)
    if how == "STOP":
        (folder / "STOP").touch()
    elif how == "SIGUSR1 to a rank":
        children = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
        ).stdout.split()
        os.kill(int(children[-1]), signal.SIGUSR1)
    elif how == "SIGTERM to torchrun":
        process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    if how != "SIGTERM to torchrun":  # torchrun's own exit code is 1 then
        assert process.returncode == 0, output
    status = runs.status(run)
    assert status["state"] == "requeue" and status["why"], (status, output)
    saved = (folder / "checkpoints" / "latest").read_text().strip()
    assert saved < f"step_{STEPS:06d}", "the run was not stopped"
    done = runs.train(run)
    assert done.returncode == 0 and f"from {folder / 'checkpoints' / saved}" in done.stdout, (
        done.stdout + done.stderr
    )
    runs.assert_same_end(run, undisturbed)


@pytest.mark.slow
def test_bad_gradients_are_skipped_and_their_batches_saved(runs):
    for fault, message in (
        ("nan", "expected finite values, got NaN or infinity first on rank 1"),
        ("spike", "is above optimizer.spike_factor 50"),
    ):
        done = runs.train(
            fault,
            "optimizer.spike_factor=50",
            fault=f"gradient:1:5:{fault}",
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert message in done.stdout and "no step taken" in done.stdout, done.stdout
        lines = [
            json.loads(line)
            for line in (runs.folder / fault / "metrics.jsonl").read_text().splitlines()
        ]
        assert [line["optimizer/skipped"] for line in lines] == [0, 0, 0, 0, 1, 0]
        (file,) = (runs.folder / fault / "bad_batches").iterdir()
        assert len(json.loads(file.read_text())) == 8
        assert all(tensor.isfinite().all() for tensor in runs.weights(fault).values())


def test_a_log_prob_gap_stops_the_run_before_the_checkpoint(runs):
    done = runs.train("gap", "rollout.log_prob_gap_stop=0.5", "run.checkpoint_every=1", ranks=1)
    assert done.returncode != 0 and re.search(
        r"step 1, .*log-prob gap \S+ nats, above rollout.log_prob_gap_stop = 0.5", done.stderr
    ), done.stderr
    assert not (runs.folder / "gap" / "checkpoints").exists()


@pytest.fixture
def saved(runs, undisturbed, tmp_path):
    """A copy of the undisturbed run."""
    shutil.copytree(runs.folder / "undisturbed", runs.folder / tmp_path.name)
    return tmp_path.name


def shard(runs, run: str) -> Path:
    return max(
        (runs.folder / run / "checkpoints" / "step_000006").glob("*.distcp"),
        key=lambda file: file.stat().st_size,
    )


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "flipped byte": (lambda f: flip(f), "is not the file that was written"),
    "truncated": (
        lambda f: f.write_bytes(f.read_bytes()[:-100]),
        "is not the file that was written",
    ),
    "missing": (lambda f: f.unlink(), "is missing"),
    "malicious metadata": (
        lambda f: flip(f.parent / ".metadata"),
        ".metadata is not the file that was written",
    ),
    "empty tracker": (
        lambda f: (f.parent.parent / "latest").write_text(""),
        "latest: expected the name of a checkpoint in",
    ),
    "no tracker": (
        lambda f: (f.parent.parent / "latest").unlink(),
        "latest: expected the name of a checkpoint, found no file",
    ),
}
QUICK = ("flipped byte", "empty tracker")


@pytest.mark.parametrize(
    "damage", [pytest.param(d, marks=() if d in QUICK else slow) for d in DAMAGE]
)
def test_damage_is_reported_with_alternatives(runs, saved, damage):
    break_it, message = DAMAGE[damage]
    break_it(shard(runs, saved))
    refused = runs.train(saved, "run.steps=7")
    assert refused.returncode != 0 and message in refused.stderr, refused.stderr
    assert "set run.resume to one of: step_000004" in refused.stderr
    assert runs.status(saved)["state"] == "failed"


@pytest.mark.slow
def test_an_older_checkpoint_by_name_gives_the_same_end(runs, saved, undisturbed):
    flip(shard(runs, saved))
    done = runs.train(saved, "run.resume=step_000004", "run.checkpoint_every=5")
    assert done.returncode == 0, done.stdout + done.stderr
    runs.assert_same_end(saved, undisturbed)
    kept = sorted(p.name for p in (runs.folder / saved / "checkpoints").iterdir())
    assert kept == ["latest", "step_000005", "step_000006"]


OTHER_RUNS = {
    "algorithm.alpha=0.05": "algorithm.alpha 0.05 (checkpoint: 0.02)",
    "data.system_prompt=Hm": "data.system_prompt Hm (checkpoint: None)",
    "run.resume=step_000005": "run.resume: expected the name of a checkpoint in",
}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.seed=9", "run.seed 9 (checkpoint: 1)"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHER_RUNS.items()),
    ],
)
def test_another_runs_checkpoint_raises(runs, saved, override, message):
    refused = runs.train(saved, "run.steps=7", override, ranks=1)
    assert refused.returncode != 0 and message in refused.stderr, refused.stderr


def test_a_checkpoint_of_an_earlier_release_raises(runs, tmp_path):
    """Its state has the position of the prompt stream and no prompts in flight."""
    checkpoints = Checkpoints(load_config(str(runs.folder / "run.yaml"), [f"run.dir={tmp_path}"]))
    path = checkpoints.folder / "step_000002"
    path.mkdir(parents=True)
    (checkpoints.folder / "latest").write_text(f"{path.name}\n")
    (path / "state.json").write_text(
        json.dumps({"step": 2, "stream": {"epoch": 0, "position": 8}, "ledger": {}})
    )
    with pytest.raises(InputError, match=f"{path}: .*earlier release"):
        checkpoints.find()


@pytest.mark.slow
def test_another_tokenizer_raises(runs, saved, tmp_path):
    for file in (runs.folder / "model").glob("*token*"):
        shutil.copy(file, tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("answer", "Answer"))
    refused = runs.train(saved, "run.steps=7", f"model.tokenizer={tmp_path}", ranks=1)
    assert refused.returncode != 0 and re.search(
        r"another run's checkpoint: tokenizer file tokenizer.json \w{16} \(checkpoint: \w{16}\);",
        refused.stderr,
    ), refused


def test_a_finished_run_says_so(runs, saved):
    done = runs.train(saved)
    assert (
        done.returncode == 0
        and "nothing to train: step 6 of 6 is done; raise run.steps to continue" in done.stdout
    )


@pytest.mark.slow
def test_another_data_parallel_size_goes_on(runs, saved, undisturbed):
    done = runs.train(saved, "run.resume=step_000004", ranks=1)
    assert done.returncode == 0, done.stdout + done.stderr
    final = runs.weights(saved)
    assert all(
        (final[name].float() - undisturbed[name].float()).abs().max() < 0.02 for name in final
    )


def test_a_save_removes_old_checkpoints_and_those_of_repeated_steps(runs, tmp_path):
    checkpoints = Checkpoints(load_config(str(runs.folder / "run.yaml"), [f"run.dir={tmp_path}"]))
    paths = [checkpoints.folder / f"step_{step:06d}" for step in (2, 4, 5, 8, 10)]
    for path in paths:
        path.mkdir(parents=True)
    checkpoints._finish(paths[2])
    assert (
        checkpoints.complete() == paths[1:3]
        and (checkpoints.folder / "latest").read_text() == "step_000005\n"
    )


def test_a_stop_saves_only_what_is_not_saved(runs, tmp_path):
    overrides = [f"run.dir={tmp_path}"]
    checkpoints = Checkpoints(load_config(str(runs.folder / "run.yaml"), overrides))
    actor = SimpleNamespace(load=lambda path: {"step": 4})
    assert not checkpoints.due_at_stop(0) and checkpoints.due_at_stop(1)
    checkpoints.load(checkpoints.folder / "step_000004", actor)
    assert not checkpoints.due_at_stop(4) and checkpoints.due_at_stop(5)
    never = Checkpoints(
        load_config(str(runs.folder / "run.yaml"), [*overrides, "run.checkpoint_every=null"])
    )
    assert not never.due_at_stop(5) and not never.due(6)


def test_configuration_of_the_fixture_is_valid(runs):
    assert load_config(str(runs.folder / "run.yaml"), ["run.dir=x"]).run.steps == STEPS
