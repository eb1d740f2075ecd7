"""The job templates with stand-ins for Slurm's commands. test_slurm.py uses a real Slurm."""

import os
import signal
import subprocess
import time

import pytest

from tests.support.distributed import ROOT

COLOCATED, DISAGGREGATED = (
    ROOT / "examples" / "slurm" / f"espo_{name}.sbatch" for name in ("colocated", "disaggregated")
)
# srun records its arguments. A training run then ends in state ENDS; `requeue` waits for STOP.
SRUN = """#!/bin/bash
echo "$*" >> "$CALLS"
case "$*" in
    *--preflight*) exit "${PREFLIGHT:-0}" ;;
    *"megatron_espo serve"*) echo $$ >> "$CALLS.keepers"; exec sleep 100 ;;
esac
while [ "$ENDS" = requeue ] && [ ! -e "$RUN_DIR/STOP" ]; do sleep 0.1; done
echo "{\\"state\\": \\"$ENDS\\", \\"why\\": null}" > "$RUN_DIR/status.json"
exit "${CODE:-0}"
"""
SCONTROL = """#!/bin/bash
case "$*" in
    "show hostnames engines"*) echo big01; echo big02 ;;
    "show hostnames"*) echo gpu03; echo gpu04; echo gpu05 ;;
    "--oneliner show node"*) echo "NodeName=$4 Arch=x86_64 NodeAddr=$4-ib NodeHostName=$4 Port=0" ;;
    requeue*) echo "requeue $2" >> "$CALLS"; kill -TERM $PPID ;;
esac
"""


@pytest.fixture
def start(tmp_path):
    """Start a template as Slurm does; return the process. srun and scontrol write to ``calls``."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "espo"}
    env |= {"SLURM_JOB_NODELIST": "gpu[03-04]", "CALLS": str(tmp_path / "calls")}
    env |= {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    env |= {"RUN_DIR": str(tmp_path / "run"), "ENDS": "done"}

    def run(template, *args: str, **more: str) -> subprocess.Popen:
        command = ["bash", template, *args]
        return subprocess.Popen(
            command, env=env | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return run


def until(condition, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def calls(tmp_path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


def test_preflight_then_training_in_the_jobs_folder(start, tmp_path):
    job = start(COLOCATED, "run.steps=5")
    text, _ = job.communicate(timeout=180)
    run = tmp_path / "run"
    one_each = "--kill-on-bad-exit=1 --ntasks-per-node=1 bash examples/run_espo_70b.sh"
    assert calls(tmp_path) == [
        f"{one_each} --preflight {run} run.steps=5",
        f"{one_each} run.steps=5 run.dir={run}",
    ]
    assert job.returncode == 0 and "exit code 0, run done" in text


def test_nothing_is_trained_on_nodes_that_fail_the_preflight(start, tmp_path):
    job = start(COLOCATED, PREFLIGHT="1")
    job.communicate(timeout=180)
    assert job.returncode == 1 and len(calls(tmp_path)) == 1


@pytest.mark.parametrize("ends, asked, code, requeued", [
    ("requeue", True, 0, True),
    ("done", True, 0, False),  # the run ended first
    ("failed", True, 1, False),
    ("requeue", False, 0, False),  # the user made the STOP file
])  # fmt: skip
def test_requeued_only_after_the_signal_and_if_the_run_saved(
    start, tmp_path, ends, asked, code, requeued
):
    job = start(COLOCATED, ENDS=ends, CODE=str(code))
    if asked:
        until(lambda: (tmp_path / "calls").exists() and len(calls(tmp_path)) == 2)
        job.send_signal(signal.SIGUSR1)
    elif ends == "requeue":
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "STOP").touch()
    text, _ = job.communicate(timeout=180)
    assert ("requeue 7" in calls(tmp_path)) == requeued, text
    assert job.returncode == (-signal.SIGTERM if requeued else code)


def test_containers_wrap_the_command(start, tmp_path):
    for container, image in {"pyxis": "/i.sqsh", "apptainer": "/i.sif"}.items():
        env = {"CONTAINER": container, "IMAGE": image, "MOUNTS": "/models:/models"}
        start(COLOCATED, **env).communicate(timeout=180)
    pyxis, _, apptainer, _ = calls(tmp_path)
    mounts = f"--container-mounts={ROOT}:{ROOT},/models:/models bash"
    assert f"--container-image=/i.sqsh --container-workdir={ROOT} {mounts}" in pyxis
    command = f"--bind {ROOT},/models:/models --pwd {ROOT} /i.sif bash examples/run_espo_70b.sh"
    assert f"apptainer exec --nv {command}" in apptainer
    job = start(COLOCATED, CONTAINER="pyxis")
    assert "CONTAINER=pyxis needs IMAGE" in job.communicate(timeout=180)[0] and job.returncode != 0


def keepers_end(tmp_path) -> bool:
    pids = (tmp_path / "calls.keepers").read_text().split()
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_keepers_run_on_the_last_nodes_and_the_trainer_on_the_others(start, tmp_path):
    job = start(DISAGGREGATED, "--model", "qwen2.5_72b", ENGINE_NODES="2", SPARE_NODES="1")
    text, _ = job.communicate(timeout=180)
    assert job.returncode == 0 and "engines: gpu04 gpu05 (1 spare); trainer: gpu03" in text
    run, common = tmp_path / "run", "--kill-on-bad-exit=1 --ntasks-per-node=1"
    script, one = "bash examples/run_espo_70b.sh", f"{common} --nodes=1 --ntasks=1"
    preflight, *keepers, train = sorted(
        calls(tmp_path), key=lambda call: ("--preflight" not in call, "run_espo" in call, call)
    )
    assert preflight == f"{common} {script} --preflight {run} --model qwen2.5_72b", "on all nodes"
    assert keepers == [
        f"{one} --nodelist={node} --output={run}/keeper-{node}.log --open-mode=append "
        f"python -m megatron_espo serve {run} --listen {node}-ib:{port}"
        for node, port in {"gpu04": 7700, "gpu05": 7701}.items()
    ]
    assert train.startswith(f"{one} --nodelist=gpu03 {script} rollout.hosts=")
    assert '["gpu04-ib:7700","gpu05-ib:7701"] rollout.engines=1 ' in train
    assert train.endswith(f"--model qwen2.5_72b run.dir={run}")
    until(lambda: keepers_end(tmp_path))


def test_engines_of_a_heterogeneous_job_use_its_second_component(start, tmp_path):
    env = {"CONTAINER": "apptainer", "IMAGE": "/i.sif"}
    job = start(DISAGGREGATED, SLURM_JOB_NODELIST_HET_GROUP_1="engines[1-2]", **env)
    text, _ = job.communicate(timeout=180)
    assert job.returncode == 0
    assert "engines: big01 big02 (0 spare); trainer: gpu03 gpu04 gpu05" in text
    keepers = [call for call in calls(tmp_path) if "megatron_espo serve" in call]
    assert len(keepers) == 2
    assert all("--het-group=1 --nodes=1" in c and "/i.sif python -m" in c for c in keepers)
    (train,) = [call for call in calls(tmp_path) if "run_espo_70b.sh rollout.hosts=" in call]
    assert "--nodelist=gpu03,gpu04,gpu05 " in train


def test_the_trainer_needs_a_node(start, tmp_path):
    job = start(DISAGGREGATED, ENGINE_NODES="3")
    text, _ = job.communicate(timeout=180)
    assert job.returncode == 2
    assert "ENGINE_NODES: expected less than the job's 3 nodes, got 3" in text


def test_layout_of_the_disaggregated_template_is_valid():
    from megatron_espo.config import load_config
    from megatron_espo.config.checks import check_model, check_world_size
    from megatron_espo.models.registry import read_spec
    from tests.test_run_espo_70b import MODELS

    words = [word.strip('"') for word in DISAGGREGATED.read_text().split()]
    keys = ("rollout.gpu", "rollout.sleep", "rollout.max", "megatron.", "algorithm.")
    layout = [word for word in words if word.startswith(keys)]
    hosts = ["rollout.engines=2", "rollout.hosts=['n9:7700', 'n10:7701']"]
    config = load_config(str(ROOT / "examples/llama3_70b_8nodes.yaml"), [*layout, *hosts])
    assert len(layout) == 5 and check_world_size(config, 64) == 2
    assert config.rollout.max_staleness == 1
    check_model(config, read_spec(MODELS["llama3_70b"]))
