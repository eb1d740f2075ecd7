"""A stop request takes effect in every phase that needs the engine; the same command resumes."""

import pytest
import torch
import yaml

from tests.faults.runs import Runs

STEPS = 4
PHASES = {"rollout": 1, "reward": 2, "eval": 2, "sync": 3}


@pytest.mark.slow
def test_stop_in_each_phase(tmp_path):
    runs = Runs.prepare(tmp_path, steps=STEPS, every=1)
    config = yaml.safe_load((tmp_path / "run.yaml").read_text())
    config["run"] = {"dir": "(given)", "steps": STEPS, "checkpoint_every": 1}
    config["model"]["dtype"] = "float32"
    config["eval"] = {"prompts": str(tmp_path / "prompts.jsonl"), "every": 1, "samples": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = runs.train("undisturbed")
    assert done.returncode == 0, done.stdout + done.stderr
    for phase, step in PHASES.items():
        done = runs.train("stopped", fault=f"{phase}:0:{step}:term")
        assert done.returncode == 0, (phase, done.stdout + done.stderr)
        assert runs.status("stopped") == {"state": "requeue", "why": "SIGTERM", "rank": 0}, phase
        # Nothing of a phase that was given up is kept; a step that was trained is.
        saved = tmp_path / "stopped" / "checkpoints" / "latest"
        kept = step - (phase in ("rollout", "reward"))
        assert (saved.read_text().strip() if saved.exists() else "") == (
            f"step_{kept:06d}" if kept else ""
        ), phase
    done = runs.train("stopped")
    assert done.returncode == 0, done.stdout + done.stderr
    one, other = runs.weights("undisturbed"), runs.weights("stopped")
    assert all(torch.equal(one[name], other[name]) for name in one)
