"""Several engines: the same rollouts as from one, each with the trainer's weights, and a failed one comes back."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_espo.config import load_config
from megatron_espo.errors import InputError
from megatron_espo.rollout import engine_devices
from tests.distributed import ROOT, run_ranks
from tests.test_agent import agent, free_address
from tests.tiny import save_tiny_model

STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    save_tiny_model(folder / "model")
    rows = [{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "run": {"dir": "(given)", "steps": STEPS, "keep_rollouts": True, "save_hf": False, "checkpoint_every": None},
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "optimizer": {"lr": 0.003},
        "rollout": {"prompts_per_step": 5, "group_size": 2, "max_response_tokens": 6, "cpu_kv_cache_gib": 0.25, "timeout_s": 120},
        "data": {"prompts": str(folder / "prompts.jsonl")},
        "reward": {"function": "tests.test_end_to_end:shortness"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def start(folder: Path, run: str, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megatron_espo", "train"]
    return subprocess.Popen(
        [*command, str(folder / "run.yaml"), f"run.dir={folder / run}", *overrides],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train(folder: Path, run: str, *overrides: str) -> str:
    process = start(folder, run, *overrides)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


def recorded(folder: Path, run: str) -> list[dict]:
    contents = [json.loads(gzip.decompress(path.read_bytes())) for path in sorted((folder / run / "rollouts").iterdir())]
    return [{key: content[key] for key in ("prompts", "rewards")} | {"ids": ids(content)} for content in contents]


def ids(content: dict) -> list:
    """Tokens, their policy version and why each response ended; log-probs differ in the last bits with the engine's batches."""
    return [[(sample[0], *sample[2:]) for sample in group] for group in content["rollouts"]]


@pytest.fixture(scope="module")
def of_one_engine(folder):
    train(folder, "one")
    return recorded(folder, "one")


def test_two_engines_sample_what_one_does(folder, of_one_engine):
    train(folder, "two", "rollout.engines=2")
    assert (folder / "two" / "engine-rank1.log").stat().st_size > 0
    assert recorded(folder, "two") == of_one_engine and len(of_one_engine) == STEPS
    lines = [json.loads(line) for line in (folder / "two" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["mismatch/canary"] for line in lines) < 1e-4, "both engines have the trainer's weights"


@pytest.mark.slow
def test_two_engines_sample_ahead_what_one_does(folder):
    ways = ["rollout.max_staleness=1", "algorithm.rollout_correction=token", "reward.overlap=true", "rollout.longest_first=true"]
    train(folder, "one-ahead", *ways)
    train(folder, "two-ahead", *ways, "rollout.engines=2")
    assert recorded(folder, "two-ahead") == recorded(folder, "one-ahead")


@pytest.mark.slow
def test_engines_of_two_agents_sample_what_one_does(folder, of_one_engine):
    run, addresses = folder / "hosts", [free_address(), free_address()]
    with agent(run, addresses[0]) as first, agent(run, addresses[1]) as second:
        output = train(folder, "hosts", f"rollout.hosts={addresses}", "rollout.engines=2")
        assert recorded(folder, "hosts") == of_one_engine
        assert [(run / name).read_text().count(f"run by the agent on {address}") for name, address in
                zip(("engine.log", "engine-rank1.log"), addresses, strict=True)] == [1, 1], output
        # The run is over, and they have been told.
        assert first.wait(20) == second.wait(20) == 0 and "the run is over" in first.words()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(line["mismatch/canary"] for line in lines) < 1e-4, "both engines have the trainer's weights"
    assert lines[-1]["sync/restarts"] == 0


def engine_pid(log: Path) -> int | None:
    """The engine process that writes to ``log``."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "fd" / "1") == str(log) and b"rollout.server" in (entry / "cmdline").read_bytes():
                return int(entry.name)
        except OSError:
            pass
    return None


@pytest.mark.slow
def test_another_ranks_engine_that_is_killed_comes_back(folder, of_one_engine):
    process = start(folder, "killed", "rollout.engines=2")
    metrics, deadline = folder / "killed" / "metrics.jsonl", time.monotonic() + 200
    while not metrics.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    os.kill(engine_pid(folder / "killed" / "engine-rank1.log"), signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "restarting the rollout engine" in output
    assert recorded(folder, "killed") == of_one_engine


def test_conversations(tmp_path):
    """Failures and interruptions, with engines made up on three ranks."""
    run_ranks(3, "tests.ranks.fleet:conversations")


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["rollout.engines=3"], 4, "expected a divisor of the 4 ranks"),
        (["rollout.engines=2", "rollout.tensor_parallel_size=4"], 4, "got 2 x 4"),
    ],
)
def test_engines_must_fit_the_ranks(folder, overrides, world_size, message):
    with pytest.raises(InputError, match=message):
        load_config(folder / "run.yaml", ["run.dir=x", *overrides]).validate_for(world_size)


def test_engines_of_one_machine_take_their_owners_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    machine = {"LOCAL_WORLD_SIZE": "8", "RANK": "12"}
    assert engine_devices(None, 4, 4, machine | {"LOCAL_RANK": "4"}) == "4,5,6,7"
    assert engine_devices(None, 1, 4, machine | {"LOCAL_RANK": "0"}) is None
    assert engine_devices("6,7", 4, 2, machine | {"LOCAL_RANK": "0"}) == "6,7"
    with pytest.raises(InputError, match="engine of rank 12 to fit on the 2 GPUs"):
        engine_devices(None, 4, 4, machine | {"LOCAL_RANK": "6"})
