"""The 70B script: bash's half chooses the launch, Python's half the settings; the rehearsal runs the whole of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_espo.config import load_config
from tests.distributed import ROOT

SCRIPT = ROOT / "examples" / "run_espo_70b.sh"
CONFIGS = sorted((ROOT / "examples").glob("*_*node*.yaml"))
SLURM = {"SLURM_JOB_ID": "70123", "SLURM_STEP_NUM_NODES": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NODEID": "5"}
SLURM |= {"SLURM_STEP_NODELIST": "gpu[03-10]", "SLURM_GPUS_ON_NODE": "8"}
# The shapes that a layout has to divide, from the models' config.json.
LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
LLAMA |= {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "max_position_embeddings": 40960}
MODELS = {
    "llama3_70b": LLAMA,
    "qwen2.5_72b": LLAMA
    | {"architectures": ["Qwen2ForCausalLM"], "intermediate_size": 29568, "vocab_size": 152064}
    | {"max_position_embeddings": 32768},
    "qwen3_4b": QWEN3
    | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32, "tie_word_embeddings": True},
    "qwen3_14b": QWEN3 | {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40},
    "qwen3_30b_a3b": QWEN3
    | {"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48}
    | {"num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
}


@pytest.fixture
def launch(tmp_path):
    """Run the script under bash with programs that only tell their arguments in torchrun's and Slurm's places."""
    programs = {"torchrun": 'printf "%s\\n" "$@"', "scontrol": "echo gpu03; echo gpu04", "nvidia-smi": "echo GPU 0; echo GPU 1"}
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)

    def run(*args: str, **env: str) -> subprocess.CompletedProcess:
        keep = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
        return subprocess.run(["bash", SCRIPT, *args], env=keep | env, capture_output=True, text=True, timeout=30)

    return run


def test_one_node_uses_its_gpus_and_a_free_port(launch):
    assert launch("run.steps=3").stdout.splitlines() == ["--standalone", "--nproc-per-node", "2", str(SCRIPT), "run.steps=3"]
    assert launch(NPROC_PER_NODE="6").stdout.splitlines()[:3] == ["--standalone", "--nproc-per-node", "6"]
    assert launch("--rehearse").stdout.splitlines()[:3] == ["--standalone", "--nproc-per-node", "4"]


def test_srun_gives_nodes_rank_and_address(launch):
    place = "--nnodes 8 --node-rank 5 --master-addr gpu03 --master-port 20123 --nproc-per-node 8"
    assert launch(**SLURM).stdout.splitlines() == [*place.split(), str(SCRIPT)]
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234", "NODE_RANK": "2", "NNODES": "8"}
    place = "--nnodes 8 --node-rank 2 --master-addr 10.0.0.1 --master-port 1234 --nproc-per-node 8"
    assert launch(**SLURM, **given).stdout.splitlines() == [*place.split(), str(SCRIPT)]
    # In the batch script itself, outside a step, there is one launcher only.
    batch = {name: value for name, value in SLURM.items() if "STEP" not in name}
    assert launch(**batch).stdout.splitlines()[0] == "--standalone"


def test_what_cannot_work_is_said(launch, tmp_path):
    done = launch(**SLURM | {"SLURM_STEP_NUM_TASKS": "64"})
    assert done.returncode == 2 and "--ntasks-per-node 1" in done.stderr
    assert "NODE_RANK" in launch(NNODES="2").stderr
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
    (tmp_path / "sitecustomize.py").write_text("import megatron_espo.cli as cli\ncli.main = lambda argv: print(argv)\n")
    env = os.environ | {"WORLD_SIZE": str(ranks), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, SCRIPT, *args], env=env, capture_output=True, text=True, timeout=60)
    command, chosen, *overrides = eval(done.stdout)
    assert (command, Path(chosen).name) == ("train", config), done.stderr
    assert overrides == [arg for arg in args if arg.startswith("run.")]


def test_torchrun_without_flags_starts_all_ranks(launch, tmp_path):
    """Its one rank hands over to bash's half, without what that torchrun put into the environment."""
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "localhost"}
    (tmp_path / "torchrun").write_text('#!/bin/sh\nprintf "%s\\n" "$@" "${RANK-none}" "${MASTER_ADDR-none}"\n')
    done = subprocess.run([sys.executable, SCRIPT, "run.steps=3"], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[:3] == ["--standalone", "--nproc-per-node", "2"], done.stderr
    assert done.stdout.splitlines()[4:] == ["run.steps=3", "none", "none"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_fit_their_nodes_and_models(path):
    name, nodes = path.stem.rsplit("_", 1)
    config = load_config(str(path))
    data_parallel = config.validate_for(8 * int("".join(filter(str.isdigit, nodes))))
    config.validate_model(MODELS[name])
    assert f"DP {data_parallel};" in path.read_text().replace(", experts EP 8", "") or data_parallel == 1
    assert (config.rollout.prompts_per_step, config.rollout.group_size, config.rollout.max_response_tokens) == (128, 8, 16384)
    assert (config.optimizer.lr, config.algorithm.alpha, config.algorithm.quantiles) == (1e-6, 0.02, (0.8,))


@pytest.mark.parametrize("state, kept", [("done", False), ("requeue", True)])
def test_rehearsal_starts_anew_after_a_finished_one_and_goes_on_with_a_stopped_one(tmp_path, monkeypatch, state, kept):
    from examples.rehearsal import RUN_DIR, prepare

    monkeypatch.chdir(tmp_path)
    Path(RUN_DIR).mkdir(parents=True)
    Path(RUN_DIR, "status.json").write_text(json.dumps({"state": state, "why": None}))
    Path("start").mkdir()
    assert f"run.dir={RUN_DIR}" in prepare(str(CONFIGS[0]), "start")
    assert Path(RUN_DIR).exists() == kept and len(list(Path(RUN_DIR).parent.iterdir())) == 1


@pytest.mark.slow
def test_rehearsal_trains_and_writes_tensorboard(tmp_path):
    """The very command of the script's header, four ranks: TP 2 x PP 2 x VPP 2 of a tiny Llama of the 70B's shape."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command = [shutil.which("torchrun"), "--nproc-per-node", "4", str(SCRIPT), "--rehearse"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
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
    assert used["algorithm"] == load_config(str(ROOT / "examples/llama3_70b_8nodes.yaml")).model_dump(mode="json")["algorithm"]
    assert used["megatron"]["recompute_granularity"] == "full" and used["megatron"]["sequence_parallel"]
