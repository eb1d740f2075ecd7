"""The job templates under a real Slurm: signal before the time limit, requeue, end of the run."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.distributed import ROOT
from tests.support.slurm_cluster import Cluster, free_ports, missing

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=f"{missing()}")]


def steps(run) -> list[int]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def submit(
    cluster, tmp_path, template: str, nodes: int, *overrides: str, **env: str
) -> tuple[str, str]:
    """Submit the rehearsal without GPUs; return ``(job, log)``. All nodes share an address."""
    log = tmp_path / "job.log"
    command = ["sbatch", "--parsable", f"--nodes={nodes}", "--gres=none", "--cpus-per-task=1"]
    command += ["--time=30", f"--output={log}", f"examples/slurm/{template}.sbatch", "--rehearse"]
    place = {"MASTER_ADDR": "127.0.0.1", "RUN_DIR": str(tmp_path / "run"), "OMP_NUM_THREADS": "1"}
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{cluster.env['PATH']}"
    env = cluster.env | place | {"PATH": path} | env
    done = subprocess.run([*command, *overrides], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), log


def save_requeue_and_finish(cluster, tmp_path, template: str, nodes: int, **env: str) -> str:
    """Signal the job between two of its twelve steps; return the log of the requeued job."""
    overrides = ("run.steps=12", "run.checkpoint_every=100", "run.save_hf=false")
    job, log = submit(cluster, tmp_path, template, nodes, *overrides, **env)
    run = tmp_path / "run"

    def ended() -> bool:
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return cluster.job(job)["JobState"] in ends

    cluster.until(lambda: steps(run) or ended(), 400)
    assert not ended(), log.read_text()
    # --signal=B:USR1@300 sends this five minutes before the limit.
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.until(lambda: cluster.job(job)["Restarts"] == "1" or ended(), 200)
    assert not ended(), log.read_text()
    first_part = steps(run)
    assert 1 <= len(first_part) < 12
    assert json.loads((run / "status.json").read_text())["state"] == "requeue"
    # Slurm delays a requeued job by two minutes.
    cluster.until(lambda: cluster.job(job)["JobState"] == "PENDING")
    cluster.run("scontrol", "update", f"jobid={job}", "StartTime=now", check=False)
    cluster.until(ended, 500)
    text = log.read_text()
    state = cluster.job(job)
    assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0"), text
    assert text.count("Fit for a run.") == 2
    assert "run requeue" in text and "exit code 0, run done" in text
    assert f"continuing after step {len(first_part)} of 12" in text
    assert steps(run) == list(range(1, 13))
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert list((run / "tensorboard").iterdir()) and (run / "summary.json").exists()
    return text


def test_run_is_saved_requeued_and_finished(tmp_path):
    (tmp_path / "slurm").mkdir()
    with Cluster(tmp_path / "slurm") as cluster:
        save_requeue_and_finish(cluster, tmp_path, "espo_colocated", 2)


def test_run_with_an_engine_on_a_separate_node_is_requeued_and_finished(tmp_path):
    (tmp_path / "slurm").mkdir()
    with Cluster(tmp_path / "slurm", nodes=3) as cluster:
        port = free_ports(1)[0]
        env = {"ENGINE_NODES": "1", "ENGINE_PORT": str(port)}
        text = save_requeue_and_finish(cluster, tmp_path, "espo_disaggregated", 3, **env)
        assert text.count("engines: n3 (0 spare); trainer: n1 n2") == 2
        said = (tmp_path / "run" / "keeper-n3.log").read_text()
        assert said.count(f"keeper: keeps a server on 127.0.0.1:{port}") == 2 and said.endswith(
            "keeper: ends: the run is over\n"
        )
        assert said.count(f"the server on 127.0.0.1:{port} is ready") >= 2
        metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        staleness = [json.loads(line)["rollout/staleness"] for line in metrics]
        assert max(staleness) == 1, "sampled during training"
