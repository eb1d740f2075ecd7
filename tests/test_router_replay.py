"""With replayed experts the gradient equals the dense float64 reference in every layout."""

import pytest

from tests.support.distributed import run_ranks
from tests.support.weights_models import save_model
from tests.test_step import CP, EP, ETP, MOE_LAYOUTS, PADDED, PP, SEQUENCE, VPP, save_older_version

RECOMPUTED = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
PENALTY = {"rollout_correction": "token", "kl_coef": 0.5, "entropy_coef": 0.3}
ROWS = {"packing": PADDED, "max_tokens": 40}
# On two ranks. SLOW_CASES run on two and on four.
CASES = {name: sizes for name, (ranks, sizes) in MOE_LAYOUTS.items() if ranks == 2} | {
    "dp2, padded": ROWS,
    "several turns, cp2": {"masked": True, CP: 2},
    "pp2 vpp2, recomputed": {PP: 2, VPP: 2} | RECOMPUTED,
    "dense layers, pp2": {"folder": "mixed", PP: 2},
    "off-policy, pp2": {"old_folder": "old", PP: 2},
    "biased routers, ep2": {"folder": "glm4_moe", EP: 2},
    "penalty and bonus, ep2": {"reference_folder": "old", "algorithm": PENALTY, EP: 2},
}
SLOW_CASES = {
    "dp2": {},
    "dp2, all in one micro-batch": {"max_tokens": 1000},
    "several turns, tp2, padded": {"masked": True} | SEQUENCE | ROWS,
    "dp2, recomputed": RECOMPUTED,
    "pp2, one layer recomputed": {PP: 2} | RECOMPUTED | {"recompute_method": "block"},
    "dp2, one sequence each": {"max_tokens": 1},
    "dp2, prompts not shared": {"packing": {"share_prompts": False}},
    "cp2, padded": {CP: 2} | ROWS,
    "several turns, dp2": {"masked": True},
    "pp2, padded, recomputed": {PP: 2} | RECOMPUTED | ROWS,
    "dense layers, ep2": {"folder": "mixed", EP: 2},
    "off-policy, cp2": {"old_folder": "old", CP: 2},
}
FOUR_RANKS = {name: sizes for name, (ranks, sizes) in MOE_LAYOUTS.items() if ranks == 4} | {
    "ep2 dp2": {EP: 2},
    "tp2 sp cp2": SEQUENCE | {CP: 2},
    "tp2 sp cp2, padded": SEQUENCE | {CP: 2} | ROWS,
    "tp2 sp pp2 vpp2, recomputed": SEQUENCE | {PP: 2, VPP: 2} | RECOMPUTED,
    "tp2 sp pp2, whole experts": SEQUENCE | {PP: 2, EP: 2, ETP: 1},
    "penalty and bonus, tp2 sp pp2": SEQUENCE
    | {"reference_folder": "old", "algorithm": PENALTY, PP: 2},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {
        name: str(tmp_path_factory.mktemp(name)) for name in ("moe", "mixed", "old", "glm4_moe")
    }
    save_model("glm4_moe", folders["glm4_moe"])
    save_model("qwen3_moe", folders["moe"], tie_word_embeddings=True)
    save_model("qwen3_moe_mixed", folders["mixed"], tie_word_embeddings=True)
    save_older_version(folders["moe"], folders["old"])
    return folders


def assert_all_equal_the_reference(folders, ranks: int, cases: dict[str, dict]) -> None:
    wanted = []
    for options in cases.values():
        arguments = {"folder": "moe", "replays": True, **options}
        check = "check_regularized_gradient" if "reference_folder" in options else "check_gradient"
        paths = {key: folders[arguments[key]] for key in arguments if key.endswith("folder")}
        wanted.append([check, arguments | paths])
    answers = run_ranks(ranks, "tests.support.ranks.step:check_all", timeout=900, cases=wanted)
    wrong = {
        name: answer for name, answer in zip(cases, answers, strict=True) if answer["worst"] > 1e-4
    }
    assert not wrong, wrong


def test_gradient_equals_the_reference(folders):
    assert_all_equal_the_reference(folders, 2, CASES)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "cases"), [(2, SLOW_CASES), (4, FOUR_RANKS)], ids=["2", "4"])
def test_gradient_equals_the_reference_in_more_layouts(folders, ranks, cases):
    assert_all_equal_the_reference(folders, ranks, cases)
