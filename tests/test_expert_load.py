"""``moe/*`` metrics: expert load, and how often the router would choose other experts."""

import pytest

from tests.support.distributed import run_ranks
from tests.test_step import save_model


@pytest.mark.parametrize(
    "ranks, sizes",
    [
        pytest.param(1, {}, marks=pytest.mark.slow),
        (2, {"expert_model_parallel_size": 2}),
        pytest.param(2, {"pipeline_model_parallel_size": 2}, marks=pytest.mark.slow),
    ],
)
def test_expert_load_equals_transformers(tmp_path, ranks, sizes):
    save_model("qwen3_moe", str(tmp_path), tie_word_embeddings=True)
    alone, replayed = run_ranks(
        ranks, "tests.support.ranks.experts:check_loads", folder=str(tmp_path), **sizes
    )
    for answer in (alone, replayed):
        for metrics in answer["found"]:
            assert metrics == pytest.approx(answer["expected"]) and metrics["moe/load_max"] > 1.1
    # Half of the tokens of one of four layers, and tokens of later layers that change with them.
    assert (
        0.125 < replayed["expected"]["moe/router_mismatch"] < 0.9
        and alone["expected"] != replayed["expected"]
    )
