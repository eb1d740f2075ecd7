"""Load-balance metrics of a mixture of experts."""

import pytest

from tests.distributed import run_ranks
from tests.test_step import save_model


@pytest.mark.parametrize("ranks, sizes", [(1, {}), (2, {"expert_model_parallel_size": 2}), (2, {"pipeline_model_parallel_size": 2})])
def test_load_is_that_of_transformers_routers(tmp_path, ranks, sizes):
    save_model("qwen3_moe", str(tmp_path), tie_word_embeddings=True)
    answer = run_ranks(ranks, "tests.ranks.experts:check_load", folder=str(tmp_path), **sizes)
    for metrics in answer["found"]:
        assert metrics == pytest.approx(answer["expected"]) and metrics["moe/load_max"] > 1.1
