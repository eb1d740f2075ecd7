"""A bit that differs between ranks raises RankMismatch with its name and ranks, in every layout."""

import pytest

from tests.support.distributed import run_ranks
from tests.support.weights_models import save_model

NORM, EMBEDDING = "decoder.final_layernorm.weight", "embedding.word_embeddings.weight"
CASES = {
    "dp2": {"sizes": {}, "weights": [NORM, EMBEDDING]},
    "tp2": {"sizes": {"tensor_model_parallel_size": 2}, "weights": [NORM, EMBEDDING]},
    "pp2": {"sizes": {"pipeline_model_parallel_size": 2}, "weights": ["output_layer.weight", NORM]},
    "cp2": {"sizes": {"context_parallel_size": 2}, "weights": [EMBEDDING]},
}
WHOLE = f"{EMBEDDING} of tensor-parallel rank 0, pipeline stage 0"
# "": no error, because only one rank has it.
PLACES = {
    "dp2": {"tokens": "", NORM: f"{NORM} of pipeline stage 0", EMBEDDING: WHOLE},
    "tp2": {
        "tokens": "micro-batches of data-parallel rank 0, context-parallel rank 0",
        NORM: f"{NORM} of pipeline stage 0",
        EMBEDDING: "",
    },
    "pp2": {
        "tokens": "micro-batches of data-parallel rank 0, context-parallel rank 0",
        "output_layer.weight": "tied embedding of tensor-parallel rank 0",
        NORM: "",
    },
    "cp2": {"tokens": "", EMBEDDING: WHOLE},
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreement")
    save_model("qwen3", folder, tie_word_embeddings=True)
    found = run_ranks(
        2, "tests.support.ranks.agreement:check", folder=str(folder), cases=list(CASES.values())
    )
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("layout", CASES)
def test_one_bit_is_named(answers, layout):
    errors = answers[layout]
    assert errors.pop("nothing") == ""
    for what, place in PLACES[layout].items():
        if place:
            assert (
                errors[what].startswith(f"{place}")
                and " on rank 0; " in errors[what]
                and errors[what].endswith(" on rank 1")
            ), (what, errors[what])
        else:
            assert errors[what] == "", (what, errors[what])


def test_gradient_norms_are_compared():
    equal, skipped, different, skipped_by_one = run_ranks(
        2, "tests.support.ranks.agreement:compare_norms"
    )
    expected = "gradient norm: expected the same on all ranks that have it, got"
    assert (
        equal == skipped == ""
        and different == f"{expected} 2.0 on rank 0; 2.1 on rank 1"
        and skipped_by_one == f"{expected} 2.0 on rank 0; nan on rank 1"
    )


def test_ranks_wait_for_rank_0_for_longer_than_the_timeout_of_collectives():
    """Rollouts may take hours."""
    assert run_ranks(2, "tests.support.ranks.agreement:wait_for_rank_0") == "rollouts"


def test_first_not_none_is_the_same_on_all_ranks():
    assert (
        run_ranks(3, "tests.support.ranks.agreement:check_first_not_none")
        == [[None, "of rank 1"]] * 3
    )
