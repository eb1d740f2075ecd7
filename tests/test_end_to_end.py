"""The training loop on a tiny model: torchrun, TP=2, Megatron-Core, vLLM, a weight update every
step.
"""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

import megatron_espo
from megatron_espo.data.rollout_store import RolloutLog
from megatron_espo.files import read_jsonl
from tests.faults.runs import environment
from tests.support.distributed import run_command, run_ranks
from tests.support.same_run import TURNS, assert_same_run
from tests.support.tiny import save_tiny_model


def shortness(prompt, response: str) -> float:
    """A custom reward function: 1 for a digit at the start."""
    return float(response.strip()[:1].isdigit())


def run_training(
    folder, *overrides: str, nproc: int = 2, fault: str = ""
) -> subprocess.CompletedProcess:
    """``megatron-espo train`` under torchrun with the configuration in ``folder``."""
    arguments = ["train", str(folder / "run.yaml"), *overrides]
    return run_command(nproc, *arguments, environment=environment(fault))


def load_weights(folder) -> dict:
    """Tensors of a Hugging Face folder."""
    from safetensors.torch import load_file

    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("end_to_end")
    save_tiny_model(folder / "model")
    rows = [
        {"prompt": f"What is {i} + {i}?", "answer": str(2 * i), "id": f"row-{i}"} for i in range(10)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "run": {"dir": str(folder / "run"), "steps": 6, "seed": 3},
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "megatron": {"tensor_model_parallel_size": 2, "max_tokens_per_micro_batch": 64},
        "optimizer": {"lr": 0.003},
        "algorithm": {"num_mini_batches": 1},
        "rollout": {
            "prompts_per_step": 8,
            "group_size": 4,
            "max_response_tokens": 6,
            "temperature": 0.7,
            "timeout_s": 120,
        },
        "data": {"prompts": str(folder / "prompts.jsonl")},
        "reward": {"function": "tests.test_end_to_end:shortness"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """A run's folder."""
    done = run_training(folder, "run.keep_rollouts=true")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def test_a_run_learns_and_writes_all_files(folder, run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers import AutoModelForCausalLM

    lines = read_jsonl(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    # Log-probs of vLLM (one process) and Megatron (TP=2) for the same tokens, at temperature 0.7.
    gaps = [line["mismatch/logprob_gap_mean"] for line in lines if line["rollout/with_advantage"]]
    assert len(gaps) >= 3 and max(gaps) < 1e-4, gaps
    rewards = [line["reward/mean"] for line in lines]
    assert rewards[-1] > rewards[0] + 0.2, rewards
    trained = [line for line in lines if line["rollout/with_advantage"]]
    assert all(line["group1/entropy"] > line["group0/entropy"] for line in trained)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["seed"] == 3 and summary["seconds"] > 0
    assert summary["reward_last3"] > summary["reward_first3"]
    assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("reward/mean")] == [1, 2, 3, 4, 5, 6]
    before = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    after = AutoModelForCausalLM.from_pretrained(run / "hf").state_dict()
    assert before.keys() == after.keys()
    assert not any(before[name].equal(after[name]) for name in before), "a tensor was not trained"


@pytest.mark.slow
def test_colocation_gives_the_same_run(folder, run):
    """The engine sleeps during training, and trainer state is on the host during sampling.

    All results are the same, bit for bit.
    """
    overrides = [f"run.dir={folder / 'turns'}", "run.keep_rollouts=true", *TURNS]
    seen = run_ranks(
        2,
        "tests.support.ranks.turns:train_watched",
        timeout=900,
        file=str(folder / "run.yaml"),
        overrides=overrides,
    )
    assert_same_run(folder / "turns", run)
    # In float32 the optimizer has no copies of the weights. Its moments exist after the first step.
    device = ["gradients", "weights"]
    step = [
        ["generate", [], "running"],
        ["update", device, "asleep"],
        ["push", ["weights"], "asleep"],
        ["canary", ["weights"], "running"],
    ]
    assert seen[:5] == [["begin", [], "running"], *step]
    step[1] = ["update", ["optimizer", *device], "asleep"]
    assert seen[5:] == step * 5 + [
        [name, ["optimizer", *device], "asleep"] for name in ("save", "export")
    ]
    names = {"time/sleep_s", "time/onload_s", "time/offload_s", "system/offloaded_gib"}
    assert all(names <= line.keys() for line in read_jsonl(folder / "turns" / "metrics.jsonl"))


@pytest.mark.slow
def test_several_updates_per_batch_under_pipeline_parallelism(folder):
    """Two mini-batches and two epochs with PP=2: a scoring pass, then four optimizer steps."""
    layout = ["megatron.tensor_model_parallel_size=1", "megatron.pipeline_model_parallel_size=2"]
    updates = [
        "algorithm.num_mini_batches=2",
        "algorithm.num_epochs=2",
        "run.steps=2",
        f"run.dir={folder / 'pp'}",
    ]
    done = run_training(folder, *layout, *updates)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = read_jsonl(folder / "pp" / "metrics.jsonl")
    # Old log-probs of the scoring pass equal the engine's. Ratios of later updates differ from 1.
    assert all(line["mismatch/logprob_gap_mean"] < 1e-4 for line in lines)
    assert any(abs(line["group1/ratio"] - 1) > 1e-6 for line in lines)


@pytest.mark.slow
def test_top_p_trains_on_the_kept_ids(folder):
    """DP=2 with several updates, a KL penalty and evaluations. A replay gives the same weights; a
    replay without top-p is an error.
    """
    settings = [
        "megatron.tensor_model_parallel_size=1",
        "algorithm.num_mini_batches=2",
        "algorithm.kl_coef=0.01",
        "eval.every=1",
        f"eval.prompts={folder / 'prompts.jsonl'}",
        "run.steps=2",
    ]
    sampled, again = folder / "top_p", folder / "top_p_again"
    top_p = "rollout.top_p=0.8"
    done = run_training(folder, *settings, top_p, f"run.dir={sampled}", "run.keep_rollouts=true")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = read_jsonl(sampled / "metrics.jsonl")
    assert all(line["mismatch/logprob_gap_max"] < 1e-3 for line in lines), lines
    replay = [*settings[:3], "run.steps=2", f"run.dir={again}", f"run.replay={sampled}/rollouts"]
    done = run_training(folder, *replay)
    assert done.returncode != 0 and "rollout.top_k, got some" in done.stdout + done.stderr
    done = run_training(folder, *replay, top_p)
    assert done.returncode == 0, done.stdout + done.stderr
    weights = [load_weights(path / "hf") for path in (sampled, again)]
    assert all(weights[1][name].equal(tensor) for name, tensor in weights[0].items())


def test_bad_row_is_reported_before_the_run_starts(folder):
    (folder / "bad.jsonl").write_text(
        '{"prompt": "What is 1?", "answer": "1"}\n{"prompt": "no answer"}\n'
    )
    done = run_training(folder, f"data.prompts={folder / 'bad.jsonl'}")
    assert done.returncode != 0
    assert "bad.jsonl:2" in done.stderr and "answer" in done.stderr, done.stderr
    package = Path(megatron_espo.__file__).parent
    assert f'File "{package}' not in done.stderr, "a user error printed a traceback"


EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True)
EP2 = ["megatron.tensor_model_parallel_size=1", "megatron.expert_model_parallel_size=2"]
WITHOUT_REPLAY = ["rollout.router_replay=false", "algorithm.rollout_correction=token"]


@pytest.mark.slow
def test_experts_reach_the_engine_every_step(folder):
    """Qwen3-MoE with EP=2. Log-probs and experts of engine and trainer agree after every update."""
    save_tiny_model(folder / "moe", "qwen3_moe", **EXPERTS)
    layout = [*EP2, f"model.path={folder / 'moe'}", f"run.dir={folder / 'moe_run'}", "run.steps=4"]
    done = run_training(folder, *layout)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = read_jsonl(folder / "moe_run" / "metrics.jsonl")
    trained = [line for line in lines if line["rollout/with_advantage"]]
    assert (
        len(trained) >= 2 and max(line["mismatch/logprob_gap_mean"] for line in trained) < 1e-4
    ), trained
    assert max(line["moe/router_mismatch"] for line in trained) < 0.01, trained
    before, after = (load_weights(path) for path in (folder / "moe", folder / "moe_run" / "hf"))
    assert before.keys() == after.keys()
    assert not any(before[name].equal(after[name]) for name in before), "a tensor was not trained"


@pytest.mark.slow
def test_router_replay_of_a_bfloat16_engine(folder):
    """The router of a bfloat16 engine often differs from the float32 trainer's. A run with
    prefetched rollouts is killed, continued and replayed: the weights are the same, bit for bit.
    Without router replay the log-prob gap is larger.
    """
    save_tiny_model(folder / "many", "qwen3_moe", **EXPERTS | {"num_experts": 16})
    settings = [
        *EP2,
        f"model.path={folder / 'many'}",
        "model.dtype=bfloat16",
        "run.steps=3",
        "run.checkpoint_every=1",
        "optimizer.lr=0.0003",
    ]
    settings += [
        "rollout.max_staleness=1",
        "rollout.over_sampling_prompts=3",
        "rollout.max_response_tokens=24",
        "algorithm.rollout_correction=token",
    ]
    command = [*settings, f"run.dir={folder / 'sampled'}", "run.keep_rollouts=true"]
    killed = run_training(folder, *command, fault="backward:1:3:kill")
    assert killed.returncode != 0 and "rank 1" in killed.stdout + killed.stderr
    runs = {
        "sampled": run_training(folder, *command),
        "again": run_training(
            folder,
            *settings,
            f"run.dir={folder / 'again'}",
            f"run.replay={folder / 'sampled' / 'rollouts'}",
        ),
        "alone": run_training(
            folder,
            *settings,
            *WITHOUT_REPLAY,
            f"run.dir={folder / 'alone'}",
            f"run.replay={folder / 'sampled' / 'rollouts'}",
        ),
    }
    assert all(done.returncode == 0 for done in runs.values()), [
        done.stdout + done.stderr for done in runs.values()
    ]
    log = RolloutLog(folder / "sampled" / "rollouts", {})
    steps = [log.read(step, None)[0] for step in (1, 2, 3)]
    assert any(g.max_staleness(step) for step, g in enumerate(steps, 1)), "no prefetched rollouts"
    weights = {name: load_weights(folder / name / "hf") for name in runs}
    assert all(weights["again"][name].equal(tensor) for name, tensor in weights["sampled"].items())
    assert not all(
        weights["alone"][name].equal(tensor) for name, tensor in weights["sampled"].items()
    )
    lines = {name: read_jsonl(folder / name / "metrics.jsonl") for name in runs}
    for name in ("moe/router_mismatch", "mismatch/logprob_gap_mean"):
        assert [line[name] for line in lines["sampled"]] == [line[name] for line in lines["again"]]
    assert (
        all(line["moe/router_mismatch"] > 0.01 for line in lines["again"])
        and "moe/router_mismatch" not in lines["alone"][0]
    )
    # The first step has the same weights and tokens.
    for gap in ("mismatch/logprob_gap_mean", "mismatch/logprob_gap_max"):
        assert lines["alone"][0][gap] > 1.5 * lines["again"][0][gap] > 0, (
            lines["alone"][0],
            lines["again"][0],
        )
