"""The 70B script: bash chooses the launch, Python the settings; the rehearsal runs both."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_espo.config import load_config
from tests.support.distributed import ROOT

SCRIPT = ROOT / "examples" / "run_espo_70b.sh"
SLURM = {"SLURM_JOB_ID": "70123", "SLURM_STEP_NUM_NODES": "8", "SLURM_STEP_NUM_TASKS": "8"}
SLURM |= {"SLURM_NODEID": "5", "SLURM_STEP_NODELIST": "gpu[03-10]", "SLURM_GPUS_ON_NODE": "8"}


def shape(architecture: str, *sizes: int, **more) -> dict:
    """The shapes in a model's ``config.json`` that a layout must divide."""
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    keys += ("num_key_value_heads", "vocab_size", "max_position_embeddings")
    named = dict(zip(keys, sizes, strict=True))
    return {"architectures": [f"{architecture}ForCausalLM"], **named, **more}


EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
MODELS = {
    "llama3_70b": shape("Llama", 8192, 28672, 80, 64, 8, 128256, 131072),
    "qwen2.5_72b": shape("Qwen2", 8192, 29568, 80, 64, 8, 152064, 32768),
    "qwen3_4b": shape("Qwen3", 2560, 9728, 36, 32, 8, 151936, 40960, tie_word_embeddings=True),
    "qwen3_14b": shape("Qwen3", 5120, 17408, 40, 40, 8, 151936, 40960),
    "qwen3_30b_a3b": shape("Qwen3Moe", 2048, 6144, 48, 32, 4, 151936, 40960, **EXPERTS),
}


@pytest.fixture
def launch(tmp_path):
    """Run the script under bash; stand-ins for torchrun and Slurm print their arguments."""
    programs = {
        "torchrun": 'printf "%s\\n" "$@"',
        "scontrol": "echo gpu03; echo gpu04",
        "nvidia-smi": "echo GPU 0; echo GPU 1",
    }
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)

    def run(*args: str, **env: str) -> subprocess.CompletedProcess:
        keep = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
        command = ["bash", SCRIPT, *args]
        return subprocess.run(command, env=keep | env, capture_output=True, text=True, timeout=90)

    return run


def test_one_node_uses_its_gpus_and_a_free_port(launch):
    one_node = "--standalone --local-addr 127.0.0.1 --nproc-per-node"
    assert launch("run.steps=3").stdout.split() == f"{one_node} 2 {SCRIPT} run.steps=3".split()
    assert launch(NPROC_PER_NODE="6").stdout.split()[:5] == f"{one_node} 6".split()
    assert launch("--rehearse").stdout.split()[:5] == f"{one_node} 4".split()


def test_srun_gives_nodes_rank_and_address(launch):
    place = "--nnodes 8 --node-rank 5 --master-addr gpu03 --master-port 20123 --nproc-per-node 8"
    assert launch(**SLURM).stdout.splitlines() == [*place.split(), str(SCRIPT)]
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234", "NODE_RANK": "2", "NNODES": "8"}
    place = "--nnodes 8 --node-rank 2 --master-addr 10.0.0.1 --master-port 1234 --nproc-per-node 8"
    assert launch(**SLURM, **given).stdout.splitlines() == [*place.split(), str(SCRIPT)]
    # In the batch script, outside a step, there is one launcher.
    batch = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert launch(**batch).stdout.splitlines()[0] == "--standalone"
    # The rehearsal has four ranks, or one on each of more nodes.
    place = {"NODE_RANK": "0", "MASTER_ADDR": "gpu03"}
    for nodes, ranks in ((2, "2"), (4, "1"), (8, "1")):
        done = launch("--rehearse", NNODES=str(nodes), **place)
        assert done.stdout.splitlines()[8:10] == ["--nproc-per-node", ranks]


def test_wrong_launches_get_a_message(launch, tmp_path):
    done = launch(**SLURM | {"SLURM_STEP_NUM_TASKS": "64"})
    assert done.returncode == 2 and "--ntasks-per-node 1" in done.stderr
    assert "NODE_RANK" in launch(NNODES="2").stderr
    done = launch("--rehearse", NNODES="3", NODE_RANK="0", MASTER_ADDR="gpu03")
    assert done.returncode == 2 and "multiple of 4 nodes, got 3" in done.stderr
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    done = launch()
    assert done.returncode == 2 and "--rehearse" in done.stderr


@pytest.mark.parametrize(
    "ranks, args, config",
    [
        (64, [], "llama3_70b_8nodes.yaml"),
        (128, ["--model", "qwen2.5_72b"], "qwen2.5_72b_16nodes.yaml"),
        (8, ["run.seed=3", "--config", "own.yaml", "run.steps=2"], "own.yaml"),
    ],
)
def test_python_half_chooses_the_settings(tmp_path, ranks, args, config):
    (tmp_path / "sitecustomize.py").write_text(
        "import megatron_espo.cli as cli\ncli.main = lambda argv: print(argv)\n"
    )
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    env = os.environ | {"WORLD_SIZE": str(ranks), "PYTHONPATH": path}
    command = [sys.executable, SCRIPT, *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    command, chosen, *overrides = eval(done.stdout)
    assert (command, Path(chosen).name) == ("train", config), done.stderr
    assert overrides == [arg for arg in args if arg.startswith("run.")]


def test_torchrun_without_flags_starts_all_ranks(launch, tmp_path):
    """Its one rank restarts the script with bash, without that torchrun's variables."""
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    env |= {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "localhost"}
    torchrun = '#!/bin/sh\nprintf "%s\\n" "$@" "${RANK-none}" "${MASTER_ADDR-none}"\n'
    (tmp_path / "torchrun").write_text(torchrun)
    command = [sys.executable, SCRIPT, "run.steps=3"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    place = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    assert done.stdout.splitlines()[:5] == place, done.stderr
    assert done.stdout.splitlines()[6:] == ["run.steps=3", "none", "none"]


@pytest.mark.parametrize("state, kept", [("done", False), ("requeue", True)])
def test_rehearsal_continues_a_stopped_run_and_replaces_a_finished_one(
    tmp_path, monkeypatch, state, kept
):
    from examples.rehearsal import RUN_DIR, prepare

    monkeypatch.chdir(tmp_path)
    Path(RUN_DIR).mkdir(parents=True)
    Path(RUN_DIR, "status.json").write_text(json.dumps({"state": state, "why": None}))
    Path("start").mkdir()
    assert f"run.dir={RUN_DIR}" in prepare(
        str(ROOT / "examples" / "llama3_70b_8nodes.yaml"), "start"
    )
    assert Path(RUN_DIR).exists() == kept and len(list(Path(RUN_DIR).parent.iterdir())) == 1


@pytest.mark.slow
def test_rehearsal_trains_and_writes_tensorboard(tmp_path):
    """The command in the script's header, four ranks: TP 2 x PP 2 x VPP 2 of a tiny Llama."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command = [shutil.which("torchrun"), "--nproc-per-node", "4", str(SCRIPT), "--rehearse"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    options = {"capture_output": True, "text": True, "timeout": 500}
    done = subprocess.run(command, cwd=tmp_path, env=env, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "rehearsal" / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    trained = [line for line in lines if line["rollout/with_advantage"]]
    assert trained and all(line["mismatch/logprob_gap_mean"] < 1e-4 for line in trained)
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("reward/mean")] == [1, 2, 3]
    used = json.loads((run / "config.json").read_text())
    settings = load_config(str(ROOT / "examples/llama3_70b_8nodes.yaml"))
    assert used["algorithm"] == settings.model_dump(mode="json")["algorithm"]
    assert used["megatron"]["recompute_granularity"] == "full"
    assert used["megatron"]["sequence_parallel"]
