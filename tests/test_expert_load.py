"""What is told of the experts in a mixture of them: how evenly tokens are dealt out, and where the trainer's router would choose others."""

import pytest

from tests.distributed import run_ranks
from tests.test_step import save_model


@pytest.mark.parametrize("ranks, sizes", [(1, {}), (2, {"expert_model_parallel_size": 2}), (2, {"pipeline_model_parallel_size": 2})])
def test_load_is_that_of_transformers_routers(tmp_path, ranks, sizes):
    save_model("qwen3_moe", str(tmp_path), tie_word_embeddings=True)
    alone, replayed = run_ranks(ranks, "tests.ranks.experts:check_loads", folder=str(tmp_path), **sizes)
    for answer in (alone, replayed):
        for metrics in answer["found"]:
            assert metrics == pytest.approx(answer["expected"]) and metrics["moe/load_max"] > 1.1
    # Half of the tokens of one of four layers, and some that follow of it.
    assert 0.125 < replayed["expected"]["moe/router_mismatch"] < 0.9 and alone["expected"] != replayed["expected"]
