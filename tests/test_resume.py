"""A learner that was saved and loaded goes on bit for bit, with its moments, its step count and its learning rate."""

import pytest

from tests.distributed import run_ranks
from tests.weights_models import save_model

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
VPP = PP2 | {"virtual_pipeline_model_parallel_size": 2}
CASES = {
    1: {"one rank": {}, "one rank bf16": {"dtype": "bfloat16"}},
    2: {"dp2 bf16": {"dtype": "bfloat16"}, "tp2": {"sizes": TP2}, "pp2 vpp2": {"sizes": VPP}, "pp2": {"sizes": PP2}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tied and an untied tiny model."""
    folder = tmp_path_factory.mktemp("resume")
    save_model("qwen3", folder / "tied", tie_word_embeddings=True)
    save_model("qwen3", folder / "untied")
    return folder


@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize("ranks", CASES)
def test_continued_equals_uninterrupted_bit_for_bit(folder, tmp_path, ranks, name):
    answers = run_ranks(
        ranks, "tests.ranks.resume:check_goes_on", timeout=600,
        folder=str(folder / name), out=str(tmp_path), cases=list(CASES[ranks].values()),
    )  # fmt: skip
    for case, answer in zip(CASES[ranks], answers, strict=True):
        assert answer["weights"] == 0 and answer["metrics"] == 0, (case, answer)
        assert answer["trained"] > 1e-2 and answer["learning rates"] == 3, (case, answer)


def test_another_layout_goes_on(folder, tmp_path):
    """Saved at DP=2, continued elsewhere: the same but for the order of float32 sums."""
    checkpoint, out = str(tmp_path / "checkpoint"), str(tmp_path / "weights")
    run_ranks(2, "tests.ranks.resume:save_and_go_on", folder=str(folder / "untied"), checkpoint=checkpoint, out=out)
    for ranks, layouts in ((1, [{}]), (2, [TP2, PP2, VPP])):
        answers = run_ranks(
            ranks, "tests.ranks.resume:go_on_elsewhere", folder=str(folder / "untied"),
            checkpoint=checkpoint, expected=out, layouts=layouts,
        )  # fmt: skip
        assert all(answer < 1e-5 for answer in answers), answers


def test_tied_pipelines_go_on_in_their_own_layout_only(folder, tmp_path):
    answers = run_ranks(
        2, "tests.ranks.resume:check_goes_on", folder=str(folder / "tied"), out=str(tmp_path), cases=[{"sizes": PP2}]
    )
    assert answers[0]["weights"] == 0
    (refusal,) = run_ranks(
        2, "tests.ranks.resume:go_on_elsewhere", folder=str(folder / "tied"),
        checkpoint=str(tmp_path / "0"), expected="", layouts=[TP2],
    )  # fmt: skip
    assert "can be loaded in the layout that wrote it only" in refusal and "pipeline_model_parallel_size 1 (checkpoint: 2)" in refusal


def test_random_number_states_are_restored(tmp_path):
    """Megatron's tracker (which differs between tensor-parallel ranks), torch's, Python's and NumPy's."""
    assert run_ranks(2, "tests.ranks.resume:check_rng", folder=str(tmp_path)) == [True, True, True]
