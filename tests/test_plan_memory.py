"""The planned memory equals that of real training steps, measured by torch's profiler."""

import pytest

from tests.support.distributed import run_ranks
from tests.support.plan_models import LLAMA_50M, QWEN3_SMALL, plan_on_cpu, settings

LENGTHS = [128] * 8
SELECTIVE = {"recompute_granularity": "selective", "head_memory_mib": 16}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
BLOCK = FULL | {"recompute_method": "block", "recompute_num_layers": 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    "hf_config, dtype, recompute",
    [
        pytest.param(LLAMA_50M, "float32", {}, id="Llama, float32"),
        pytest.param(QWEN3_SMALL, "bfloat16", {}, id="Qwen3 (tied), bfloat16"),
        pytest.param(LLAMA_50M, "float32", SELECTIVE, id="selective, logits in chunks"),
        pytest.param(LLAMA_50M, "float32", FULL, id="full recomputation, uniform"),
        pytest.param(LLAMA_50M, "bfloat16", BLOCK, id="full recomputation, block"),
    ],
)
def test_memory_of_a_real_step(tmp_path, hf_config, dtype, recompute):
    offload = ["optimizer", "gradients", "weights"]
    megatron = {"max_tokens_per_micro_batch": sum(LENGTHS), "offload": offload} | recompute
    megatron["transformer_impl"] = "local"
    # gloo's reduce-scatter copies the gradients, which would hide what full recomputation keeps.
    sharded = recompute.get("recompute_granularity") != "full"
    sections = {
        "optimizer": {"use_distributed_optimizer": sharded},
        "model": {"path": str(tmp_path), "dtype": dtype},
        "megatron": megatron,
        "algorithm": {"num_mini_batches": 1},
        "rollout": {
            "prompts_per_step": 1,
            "group_size": len(LENGTHS),
            "max_response_tokens": LENGTHS[0],
        },
    }
    (stage,) = plan_on_cpu(tmp_path, hf_config, LENGTHS[0], **sections)["memory"]
    run = settings(tmp_path, hf_config, **sections)
    real = run_ranks(1, "tests.support.ranks.plan:measure_step", settings=run, lengths=LENGTHS)
    phases = {name: trainer for name, (trainer, _) in stage["phases"].items()}
    static = sum(stage[part] for part in ("weights", "gradients", "main_weights", "adam"))
    planned = {"static": static} | {name: phases[name] for name in ("canary", "rollouts")}
    for phase, expected in planned.items():
        # The rest are cached rotary angles and random states, which belong to no parameter.
        assert 0 <= real[phase] - expected < 128 * 1024, phase
    assert real["host"] == stage["host"]
    assert phases["training"] - static == pytest.approx(real["peak"], rel=0.1)
