"""The job templates under a real Slurm: two nodes of two ranks, or three, one of them an engine's; asked to end by the clock's signal, requeued, done."""

import json
import os
import subprocess
import sys

import pytest

from tests.distributed import ROOT
from tests.slurm_cluster import Cluster, free_ports, missing

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=f"{missing()}")]


def steps(run) -> list[int]:
    path = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def submit(cluster, tmp_path, template: str, nodes: int, *overrides: str, **env: str) -> tuple[str, str]:
    """``(job, log)`` of the rehearsal on so many nodes. No GPUs here, and nodes that share one machine's address."""
    log = tmp_path / "job.log"
    command = ["sbatch", "--parsable", f"--nodes={nodes}", "--gres=none", "--cpus-per-task=1", "--time=30", f"--output={log}"]
    command += [f"examples/slurm/{template}.sbatch", "--rehearse", *overrides]
    place = {"MASTER_ADDR": "127.0.0.1", "RUN_DIR": str(tmp_path / "run"), "OMP_NUM_THREADS": "1"}
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{cluster.env['PATH']}"
    done = subprocess.run(command, cwd=ROOT, env=cluster.env | place | {"PATH": path} | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), log


def save_requeue_and_finish(cluster, tmp_path, template: str, nodes: int, **env: str) -> str:
    """The job's log, after the signal of the clock between two of its twelve steps."""
    job, log = submit(cluster, tmp_path, template, nodes, "run.steps=12", "run.checkpoint_every=100", "run.save_hf=false", **env)
    run = tmp_path / "run"

    def ended() -> bool:
        return cluster.job(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    cluster.until(lambda: steps(run) or ended(), 400)
    assert not ended(), log.read_text()
    # What --signal=B:USR1@300 does five minutes before the limit.
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.until(lambda: cluster.job(job)["Restarts"] == "1" or ended(), 200)
    assert not ended(), log.read_text()
    first_part = steps(run)
    assert 1 <= len(first_part) < 12 and json.loads((run / "status.json").read_text())["state"] == "requeue"
    # Slurm holds a requeued job back for two minutes.
    cluster.until(lambda: cluster.job(job)["JobState"] == "PENDING")
    cluster.run("scontrol", "update", f"jobid={job}", "StartTime=now", check=False)
    cluster.until(ended, 500)
    text = log.read_text()
    assert cluster.job(job)["JobState"] == "COMPLETED" and cluster.job(job)["ExitCode"] == "0:0", text
    assert text.count("Fit for a run.") == 2 and "run requeue" in text and "exit code 0, run done" in text
    assert f"going on after step {len(first_part)} of 12" in text
    assert steps(run) == list(range(1, 13))
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert list((run / "tensorboard").iterdir()) and (run / "summary.json").exists()
    return text


def test_run_is_saved_requeued_and_finished(tmp_path):
    (tmp_path / "slurm").mkdir()
    with Cluster(tmp_path / "slurm") as cluster:
        save_requeue_and_finish(cluster, tmp_path, "espo_colocated", 2)


def test_run_with_an_engine_on_a_node_of_its_own_is_requeued_and_finished(tmp_path):
    (tmp_path / "slurm").mkdir()
    with Cluster(tmp_path / "slurm", nodes=3) as cluster:
        port = free_ports(1)[0]
        text = save_requeue_and_finish(cluster, tmp_path, "espo_disaggregated", 3, ENGINE_NODES="1", ENGINE_PORT=str(port))
        assert text.count("engines: n3 (0 spare); trainer: n1 n2") == 2
        said = (tmp_path / "run" / "keeper-n3.log").read_text()
        assert said.count(f"keeper: keeps a server on 127.0.0.1:{port}") == 2 and said.endswith("keeper: ends: the run is over\n")
        assert said.count(f"the server on 127.0.0.1:{port} is ready") >= 2
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert max(line["rollout/staleness"] for line in lines) == 1, "sampled while training"
