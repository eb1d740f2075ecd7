"""The plan's memory against real training steps: every allocation of a rank on a CPU, as torch's profiler sees it."""

import pytest

from tests.distributed import run_ranks
from tests.plan_models import LLAMA_50M, QWEN3_SMALL, plan_on_cpu, settings

LENGTHS = [128] * 8
SELECTIVE = {"recompute_granularity": "selective", "head_memory_mib": 16}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    "hf_config, dtype, recompute",
    [
        pytest.param(LLAMA_50M, "float32", {}, id="Llama, float32"),
        pytest.param(QWEN3_SMALL, "bfloat16", {}, id="Qwen3 (tied), bfloat16"),
        pytest.param(LLAMA_50M, "float32", SELECTIVE, id="selective recomputation, logits in chunks"),
        pytest.param(LLAMA_50M, "float32", FULL, id="full recomputation, uniform"),
        pytest.param(LLAMA_50M, "bfloat16", BLOCK, id="full recomputation, block"),
    ],
)
def test_memory_of_a_real_step(tmp_path, hf_config, dtype, recompute):
    sections = {
        # gloo scatters gradients into a copy of them, which would hide the little that full recomputation keeps.
        "optimizer": {"use_distributed_optimizer": recompute.get("recompute_granularity") != "full"},
        "model": {"path": str(tmp_path), "dtype": dtype},
        "megatron": {"max_tokens_per_micro_batch": sum(LENGTHS), "offload": ["optimizer", "gradients", "weights"]} | recompute,
        "rollout": {"prompts_per_step": 1, "group_size": len(LENGTHS), "max_response_tokens": LENGTHS[0]},
    }
    (stage,) = plan_on_cpu(tmp_path, hf_config, LENGTHS[0], **sections)["memory"]
    real = run_ranks(1, "tests.ranks.plan:measure_step", settings=settings(tmp_path, hf_config, **sections), lengths=LENGTHS)
    phases = {name: trainer for name, (trainer, _) in stage["phases"].items()}
    for phase, planned in (("static", stage["static"]), ("canary", phases["canary"]), ("rollouts", phases["rollouts"])):
        caches = real[phase] - planned  # a table of rotary angles, random states: no parameter of any kind
        assert 0 <= caches < 128 * 1024, phase
    assert real["host"] == stage["host"]
    assert phases["training"] - stage["static"] == pytest.approx(real["peak"], rel=0.1)
