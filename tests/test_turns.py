"""Colocation (sleeping engines, offloaded trainer state) changes no result, bit for bit, in every
layout and after faults.
"""

import pytest

from tests.faults.runs import Runs
from tests.support.same_run import TURNS, assert_same_run
from tests.support.tiny import save_tiny_model, write_tiny_run
from tests.test_end_to_end import EXPERTS

STEPS = 4
LAYOUTS = {
    "dp2": [],
    "tp2": ["megatron.tensor_model_parallel_size=2", "megatron.sequence_parallel=true"],
    "pp2 vpp2": [
        "megatron.pipeline_model_parallel_size=2",
        "megatron.virtual_pipeline_model_parallel_size=2",
    ],
    "ep2": ["megatron.expert_model_parallel_size=2", "model.path={moe}"],
    "two engines": ["rollout.engines=2", "algorithm.num_epochs=2"],
    "penalty": ["algorithm.kl_coef=0.1"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """A run in bfloat16 with an evaluation every step and checkpoints, which also need the trainer
    state.
    """
    folder = tmp_path_factory.mktemp("turns")
    save_tiny_model(folder / "model", num_hidden_layers=4)
    save_tiny_model(folder / "moe", "qwen3_moe", **EXPERTS)
    write_tiny_run(
        folder,
        run={"steps": STEPS, "checkpoint_every": 2, "keep_rollouts": True},
        model={"dtype": "bfloat16"},
        rollout={"group_size": 4, "engine_args": {"kv_cache_memory_bytes": 1 << 28}},
        eval={"prompts": str(folder / "prompts.jsonl"), "every": 1, "samples": 2},
    )
    return Runs(folder, STEPS)


def train(runs: Runs, name: str, *overrides: str, fault: str | None = None) -> str:
    done = runs.train(name, *overrides, fault=fault)
    assert (done.returncode == 0) == (fault is None or fault.endswith("term")), (
        done.stdout + done.stderr
    )
    return done.stdout


@pytest.fixture(scope="module")
def plain(runs):
    """The run without colocation."""
    train(runs, "dp2")
    return runs.folder / "dp2"


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_run(runs, plain, layout):
    overrides = [override.format(moe=runs.folder / "moe") for override in LAYOUTS[layout]]
    if overrides:
        train(runs, layout, *overrides)
    train(runs, f"{layout}, turns", *overrides, *TURNS)
    assert_same_run(runs.folder / f"{layout}, turns", runs.folder / layout)
    one, other = (
        (runs.folder / name / "eval.jsonl").read_text() for name in (layout, f"{layout}, turns")
    )
    assert one == other and len(one.splitlines()) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("switch", TURNS)
def test_each_setting_alone(runs, plain, switch):
    name = switch.partition("=")[0]
    train(runs, name, switch, "rollout.canary_prompts=0")
    assert_same_run(runs.folder / name, plain, "mismatch/canary")


@pytest.mark.slow
def test_a_killed_and_a_stopped_run_continue(runs, plain):
    """A kill in the training of step 3, then a stop in the sampling of step 4, while the trainer
    state is on the host.
    """
    for fault in ("backward:1:3:kill", "rollout:0:4:term"):
        train(runs, "disturbed", *TURNS, fault=fault)
    assert runs.status("disturbed")["state"] == "requeue"
    assert (runs.folder / "disturbed" / "checkpoints" / "latest").read_text() == "step_000003\n"
    train(runs, "disturbed", *TURNS)
    # A resumed run has other canary prompts.
    assert_same_run(runs.folder / "disturbed", plain, "mismatch/canary")


@pytest.mark.slow
def test_a_replayed_run_without_engine(runs, plain):
    train(runs, "replayed", *TURNS, f"run.replay={plain / 'rollouts'}", "run.save_hf=true")
    assert runs.weights("replayed").keys() == runs.weights("dp2").keys()
    assert all(
        tensor.equal(runs.weights("dp2")[name]) for name, tensor in runs.weights("replayed").items()
    )
