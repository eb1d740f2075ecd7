"""A run that is killed, stopped or damaged goes on by the same command, and ends with the weights of the undisturbed one, bit for bit.

The rollouts are recorded ones (``run.replay``), so no engine runs here.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_espo.batch import ScoredGroups
from megatron_espo.checkpoints import Checkpoints
from megatron_espo.config import load_config
from megatron_espo.faults import VARIABLE
from megatron_espo.rollout_log import RolloutLog
from megatron_espo.types import Prompt, Rollout
from tests.distributed import ROOT
from tests.tiny import WORDS, save_tiny_model

STEPS, EVERY = 6, 2


def record_rollouts(folder: Path) -> None:
    """Six steps of made-up rollouts: four prompts, two responses each."""
    log, draw = RolloutLog(folder, {}), random.Random(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(4, len(WORDS)) for _ in range(count))

    for step in range(1, STEPS + 3):
        prompts = [Prompt(f"{step}-{i}", "", "", ids(5)) for i in range(4)]
        groups = []
        for prompt in prompts:
            lengths = [draw.randint(1, 6) for _ in range(2)]
            groups.append([Rollout(prompt, ids(n), (-2.0,) * n, "stop", step - 1, "") for n in lengths])
        rewards = torch.tensor([[draw.random(), draw.random()] for _ in prompts])
        log.write(step, ScoredGroups(groups, rewards, 4), before={}, after={})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("goes_on")
    save_tiny_model(folder / "model")
    record_rollouts(folder / "rollouts")
    rows = [{"prompt": f"What is {i}?", "answer": str(i)} for i in range(9)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "run": {"dir": "(given)", "steps": STEPS, "checkpoint_every": EVERY, "replay": str(folder / "rollouts")},
        "model": {"path": str(folder / "model"), "dtype": "bfloat16"},
        "optimizer": {"lr": 0.003},
        "rollout": {"prompts_per_step": 4, "group_size": 2, "max_response_tokens": 6},
        "data": {"prompts": str(folder / "prompts.jsonl")},
        "reward": {"function": "tests.test_end_to_end:shortness"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def command(folder: Path, run: str, *overrides: str, ranks: int = 2) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, "-m", "megatron_espo", "train", str(folder / "run.yaml"), f"run.dir={folder / run}", *overrides]


def environment(fault: str | None = None) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | ({VARIABLE: fault} if fault else {})


def train(folder: Path, run: str, *overrides: str, ranks: int = 2, fault: str | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(folder, run, *overrides, ranks=ranks), cwd=ROOT, env=environment(fault), capture_output=True, text=True, timeout=300
    )


def weights(folder: Path, run: str) -> dict[str, torch.Tensor]:
    return {name: t for file in (folder / run / "hf").glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.fixture(scope="module")
def undisturbed(folder):
    done = train(folder, "undisturbed")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((folder / "undisturbed" / "status.json").read_text())["state"] == "done"
    kept = sorted(p.name for p in (folder / "undisturbed" / "checkpoints").iterdir())
    assert kept == ["latest", "step_000004", "step_000006"]
    final = weights(folder, "undisturbed")
    start = load_file(folder / "model" / "model.safetensors")
    assert any((final[name].float() - start[name]).abs().max() > 1e-3 for name in final), "nothing was trained"
    return final


def assert_same_end(folder: Path, run: str, undisturbed) -> None:
    """Equal weights, and every step once in both records."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    final = weights(folder, run)
    assert final.keys() == undisturbed.keys()
    assert all(torch.equal(final[name], undisturbed[name]) for name in final)
    lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["ledger/dispatched"] == lines[-1]["ledger/trained"] == 4 * STEPS
    board = EventAccumulator(str(folder / run / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("reward/mean")] == list(range(1, STEPS + 1))


slow = pytest.mark.slow
FAULTS = [
    pytest.param("backward:1:1:kill", marks=slow),  # before there is any checkpoint
    "backward:1:5:kill",
    pytest.param("backward:0:4:kill", marks=slow),
    pytest.param("save:1:4:kill", marks=slow),  # between the writing of shards
    "save:1:4:full",
    pytest.param("rename:0:4:kill", marks=slow),
    pytest.param("rename:0:4:full", marks=slow),
    "latest:0:4:kill",
    pytest.param("gradient:1:3:raise", marks=slow),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_same_command_goes_on_after(folder, undisturbed, fault):
    run = fault.replace(":", "-")
    broken = train(folder, run, fault=fault)
    assert broken.returncode != 0, broken.stdout
    done = train(folder, run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_end(folder, run, undisturbed)


def wait_for_step(process: subprocess.Popen, folder: Path, run: str, step: int) -> None:
    metrics = folder / run / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended too early"
        time.sleep(0.02)


WAYS = ["STOP", *(pytest.param(how, marks=slow) for how in ("SIGUSR1 to a rank", "SIGTERM to torchrun", "wall clock"))]


@pytest.mark.parametrize("how", WAYS)
def test_stop_request_saves_and_the_same_command_goes_on(folder, undisturbed, how):
    run, overrides = how.replace(" ", "-"), ["run.max_seconds=1"] if how == "wall clock" else []
    process = subprocess.Popen(
        command(folder, run, *overrides), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_step(process, folder, run, 1)
    if how == "STOP":
        (folder / run / "STOP").touch()
    elif how == "SIGUSR1 to a rank":
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[-1]), signal.SIGUSR1)
    elif how == "SIGTERM to torchrun":
        process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    status = json.loads((folder / run / "status.json").read_text())
    if how != "SIGTERM to torchrun":  # torchrun's own exit code is 1 then
        assert process.returncode == 0, output
    assert status["state"] == "requeue" and status["why"], (status, output)
    saved = (folder / run / "checkpoints" / "latest").read_text().strip()
    assert saved < f"step_{STEPS:06d}", "it was not stopped"
    done = train(folder, run)
    assert done.returncode == 0 and f"from {folder / run / 'checkpoints' / saved}" in done.stdout, done.stdout + done.stderr
    assert_same_end(folder, run, undisturbed)


@pytest.fixture
def saved(folder, undisturbed, tmp_path):
    """A copy of the undisturbed run, as if it had two steps to go."""
    shutil.copytree(folder / "undisturbed", folder / tmp_path.name)
    return tmp_path.name


def shard(folder: Path, run: str) -> Path:
    return max((folder / run / "checkpoints" / "step_000006").glob("*.distcp"), key=lambda file: file.stat().st_size)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "flipped byte": (lambda f: flip(f), "is not the file that was written"),
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-100]), "is not the file that was written"),
    "missing": (lambda f: f.unlink(), "is missing"),
    "malicious metadata": (lambda f: flip(f.parent / ".metadata"), ".metadata is not the file that was written"),
    "empty tracker": (lambda f: (f.parent.parent / "latest").write_text(""), 'latest: expected the name of a checkpoint in'),
    "no tracker": (lambda f: (f.parent.parent / "latest").unlink(), "latest: expected the name of a checkpoint, found no file"),
}


QUICK = ("flipped byte", "empty tracker")


@pytest.mark.parametrize("damage", [pytest.param(d, marks=() if d in QUICK else slow) for d in DAMAGE])
def test_damage_is_named_and_falling_back_needs_a_word(folder, saved, damage):
    break_it, message = DAMAGE[damage]
    break_it(shard(folder, saved))
    refused = train(folder, saved, "run.steps=7")
    assert refused.returncode != 0 and message in refused.stderr, refused.stderr
    assert "set run.resume to one of: step_000004" in refused.stderr
    assert json.loads((folder / saved / "status.json").read_text())["state"] == "failed"


def test_an_older_checkpoint_by_name_gives_the_same_end(folder, saved, undisturbed):
    flip(shard(folder, saved))
    done = train(folder, saved, "run.resume=step_000004", "run.checkpoint_every=5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_end(folder, saved, undisturbed)
    kept = sorted(p.name for p in (folder / saved / "checkpoints").iterdir())
    assert kept == ["latest", "step_000005", "step_000006"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.alpha=0.05", "algorithm.alpha 0.05 (checkpoint: 0.02)"),
        ("run.seed=9", "run.seed 9 (checkpoint: 1)"),
        ("data.system_prompt=Hm", "data.system_prompt Hm (checkpoint: None)"),
        ("run.resume=step_000005", 'run.resume: expected the name of a checkpoint in'),
    ],
)
def test_another_runs_checkpoint_is_refused(folder, saved, override, message):
    refused = train(folder, saved, "run.steps=7", override, ranks=1)
    assert refused.returncode != 0 and message in refused.stderr, refused.stderr


def test_a_finished_run_says_so(folder, saved):
    done = train(folder, saved)
    assert done.returncode == 0 and "nothing to train: step 6 of 6 is done; raise run.steps to go on" in done.stdout


def test_another_data_parallel_size_goes_on(folder, saved, undisturbed):
    done = train(folder, saved, "run.resume=step_000004", ranks=1)
    assert done.returncode == 0, done.stdout + done.stderr
    final = weights(folder, saved)
    assert all((final[name].float() - undisturbed[name].float()).abs().max() < 0.02 for name in final)


def test_nan_gradient_is_skipped_and_its_batch_kept(folder):
    done = train(folder, "nan", fault="gradient:1:3:nan")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "got NaN or infinity first on rank 1; no step taken" in done.stdout
    lines = [json.loads(line) for line in (folder / "nan" / "metrics.jsonl").read_text().splitlines()]
    assert [line["optimizer/skipped"] for line in lines] == [0, 0, 1, 0, 0, 0]
    (file,) = (folder / "nan" / "bad_batches").iterdir()
    assert len(json.loads(file.read_text())) == 8
    assert all(tensor.isfinite().all() for tensor in weights(folder, "nan").values())


def test_a_save_removes_old_checkpoints_and_those_of_steps_taken_back(folder, tmp_path):
    checkpoints = Checkpoints(load_config(str(folder / "run.yaml"), [f"run.dir={tmp_path}"]))
    paths = [checkpoints.folder / f"step_{step:06d}" for step in (2, 4, 5, 8, 10)]
    for path in paths:
        path.mkdir(parents=True)
    checkpoints._finish(paths[2])
    assert checkpoints.complete() == paths[1:3] and (checkpoints.folder / "latest").read_text() == "step_000005\n"


def test_a_stop_saves_only_what_is_not_saved(folder, tmp_path):
    overrides = [f"run.dir={tmp_path}"]
    checkpoints = Checkpoints(load_config(str(folder / "run.yaml"), overrides))
    learner = SimpleNamespace(load=lambda path: {"step": 4})
    assert checkpoints.due_at_stop(0)
    checkpoints.load(checkpoints.folder / "step_000004", learner)
    assert not checkpoints.due_at_stop(4) and checkpoints.due_at_stop(5)
    never = Checkpoints(load_config(str(folder / "run.yaml"), [*overrides, "run.checkpoint_every=null"]))
    assert not never.due_at_stop(5) and not never.due(6)


def test_configuration_of_the_fixture_is_valid(folder):
    assert load_config(str(folder / "run.yaml"), ["run.dir=x"]).run.steps == STEPS
