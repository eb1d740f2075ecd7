"""The job templates, with programs that only tell what they were asked in Slurm's place. A real Slurm: test_slurm.py."""

import os
import signal
import subprocess
import time

import pytest

from tests.distributed import ROOT

COLOCATED, DISAGGREGATED = (ROOT / "examples" / "slurm" / f"espo_{name}.sbatch" for name in ("colocated", "disaggregated"))
# srun notes its arguments; a training run then ends as ENDS says, once there is a STOP file if that is its state.
SRUN = """#!/bin/bash
echo "$*" >> "$CALLS"
case "$*" in *--preflight*) exit "${PREFLIGHT:-0}" ;; esac
while [ "$ENDS" = requeue ] && [ ! -e "$RUN_DIR/STOP" ]; do sleep 0.1; done
echo "{\\"state\\": \\"$ENDS\\", \\"why\\": null}" > "$RUN_DIR/status.json"
exit "${CODE:-0}"
"""
SCONTROL = """#!/bin/bash
case "$1" in
    show) echo gpu03; echo gpu04 ;;
    requeue) echo "requeue $2" >> "$CALLS"; kill -TERM $PPID ;;
esac
"""


@pytest.fixture
def start(tmp_path):
    """Start a template as Slurm does; answers the process. ``calls`` holds what srun and scontrol were asked."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "espo", "SLURM_JOB_NODELIST": "gpu[03-04]"}
    env |= {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    env |= {"RUN_DIR": str(tmp_path / "run"), "ENDS": "done"}

    def run(template, *args: str, **more: str) -> subprocess.Popen:
        command = ["bash", template, *args]
        return subprocess.Popen(command, env=env | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return run


def until(condition, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def calls(tmp_path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


def test_preflight_then_training_with_the_jobs_own_folder(start, tmp_path):
    job = start(COLOCATED, "run.steps=5")
    text, _ = job.communicate(timeout=60)
    run, one_each = tmp_path / "run", "--kill-on-bad-exit=1 --ntasks-per-node=1 bash examples/run_espo_70b.sh"
    assert calls(tmp_path) == [f"{one_each} --preflight {run} run.steps=5", f"{one_each} run.steps=5 run.dir={run}"]
    assert job.returncode == 0 and "exit code 0, run done" in text


def test_nothing_is_trained_on_nodes_that_fail_the_preflight(start, tmp_path):
    job = start(COLOCATED, PREFLIGHT="1")
    job.communicate(timeout=60)
    assert job.returncode == 1 and len(calls(tmp_path)) == 1


@pytest.mark.parametrize("ends, asked, code, requeued", [
    ("requeue", True, 0, True),
    ("done", True, 0, False),  # the end came first
    ("failed", True, 1, False),
    ("requeue", False, 0, False),  # somebody made the STOP file by hand
])  # fmt: skip
def test_requeued_only_if_the_clock_asked_and_the_run_saved(start, tmp_path, ends, asked, code, requeued):
    job = start(COLOCATED, ENDS=ends, CODE=str(code))
    if asked:
        until(lambda: (tmp_path / "calls").exists() and len(calls(tmp_path)) == 2)
        job.send_signal(signal.SIGUSR1)
    elif ends == "requeue":
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "STOP").touch()
    text, _ = job.communicate(timeout=60)
    assert ("requeue 7" in calls(tmp_path)) == requeued, text
    assert job.returncode == (-signal.SIGTERM if requeued else code)


def test_containers_wrap_the_command(start, tmp_path):
    start(COLOCATED, CONTAINER="pyxis", IMAGE="/i.sqsh", MOUNTS="/models:/models").communicate(timeout=60)
    start(COLOCATED, CONTAINER="apptainer", IMAGE="/i.sif").communicate(timeout=60)
    pyxis, _, apptainer, _ = calls(tmp_path)
    assert f"--container-image=/i.sqsh --container-workdir={ROOT} --container-mounts={ROOT}:{ROOT},/models:/models bash" in pyxis
    assert f"apptainer exec --nv --bind {ROOT} --pwd {ROOT} /i.sif bash examples/run_espo_70b.sh" in apptainer
    job = start(COLOCATED, CONTAINER="pyxis")
    assert "CONTAINER=pyxis needs IMAGE" in job.communicate(timeout=60)[0] and job.returncode != 0


def test_split_gives_the_engine_the_first_nodes_last_gpus(start, tmp_path):
    text, _ = start(DISAGGREGATED, "--model", "qwen2.5_72b").communicate(timeout=60)
    assert "engine: GPUs 4,5,6,7 of gpu03; trainer: its other 4, and 8 on each of: gpu04" in text
    train = calls(tmp_path)[1]
    assert 'rollout.visible_devices="4,5,6,7"' in train and "rollout.transport=nccl" in train
    # What each node then runs, with a script in the place of run_espo_70b.sh.
    (tmp_path / "ranks.sh").write_text('echo "$NPROC_PER_NODE $*"\n')
    line = next(line for line in DISAGGREGATED.read_text().splitlines() if line.startswith("with_ranks="))
    probe = f'gpus=8 engine_gpus=4\n{line}\nfor SLURM_NODEID in 0 1; do export SLURM_NODEID; "${{with_ranks[@]}}" {tmp_path}/ranks.sh a b; done'
    done = subprocess.run(["bash", "-c", probe], capture_output=True, text=True, timeout=30)
    assert done.stdout.splitlines() == ["4 a b", "8 a b"], done.stderr


def test_split_layout_fits_its_sixty_ranks():
    from megatron_espo.config import load_config
    from tests.test_run_espo_70b import MODELS

    layout = [word for word in DISAGGREGATED.read_text().split() if word.startswith(("megatron.", "rollout.engines"))]
    config = load_config(str(ROOT / "examples/llama3_70b_8nodes.yaml"), layout)
    assert len(layout) == 4 and config.validate_for(60) == 3
    config.validate_model(MODELS["llama3_70b"])
