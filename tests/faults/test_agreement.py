"""One bit that differs on one rank ends the step, with the ranks and what differs; equal ranks are left alone in every layout."""

import pytest

from tests.distributed import run_ranks
from tests.weights_models import save_model

NORM, EMBEDDING = "decoder.final_layernorm.weight", "embedding.word_embeddings.weight"
CASES = {
    "dp2": {"sizes": {}, "weights": [NORM, EMBEDDING]},
    "tp2": {"sizes": {"tensor_model_parallel_size": 2}, "weights": [NORM, EMBEDDING]},
    "pp2": {"sizes": {"pipeline_model_parallel_size": 2}, "weights": ["output_layer.weight", NORM]},
    "cp2": {"sizes": {"context_parallel_size": 2}, "weights": [EMBEDDING]},
}
WHOLE = f"{EMBEDDING} of tensor-parallel rank 0, pipeline stage 0"
# "" is left alone: there are no two of it.
PLACES = {
    "dp2": {"tokens": "", NORM: f"{NORM} of pipeline stage 0", EMBEDDING: WHOLE},
    "tp2": {"tokens": "micro-batches of data-parallel rank 0, context-parallel rank 0", NORM: f"{NORM} of pipeline stage 0", EMBEDDING: ""},
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
    found = run_ranks(2, "tests.ranks.agreement:check", folder=str(folder), cases=list(CASES.values()))
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("layout", CASES)
def test_one_bit_is_named(answers, layout):
    said = answers[layout]
    assert said.pop("nothing") == ""
    for what, place in PLACES[layout].items():
        if place:
            assert said[what].startswith(f"{place}") and " on rank 0; " in said[what] and said[what].endswith(" on rank 1"), (what, said[what])
        else:
            assert said[what] == "", (what, said[what])


def test_gradient_norms_are_compared():
    equal, skipped, different, skipped_by_one = run_ranks(2, "tests.ranks.agreement:check_norms")
    expected = "gradient norm: expected the same on all ranks that have it, got"
    assert equal == skipped == "" and different == f"{expected} 2.0 on rank 0; 2.1 on rank 1" and skipped_by_one == f"{expected} 2.0 on rank 0; nan on rank 1"


def test_the_first_answer_is_everybodys():
    assert run_ranks(3, "tests.ranks.agreement:check_first_answer") == [[None, "of rank 1"]] * 3
