"""Router replay: given experts that its routers would not choose, a step's gradient is still the dense float64 reference's, whatever the layout."""

import pytest

from tests.distributed import run_ranks
from tests.test_step import CP, EP, ETP, MOE_LAYOUTS, PADDED, PP, SEQUENCE, VPP, save_older_version
from tests.weights_models import save_model

RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
PENALTY = {"rollout_correction": "token", "kl_coef": 0.5, "entropy_coef": 0.3}
ROWS = {"packing": PADDED, "max_tokens": 40}
# Two ranks; on four the slow ones.
CASES = {name: sizes for name, (ranks, sizes) in MOE_LAYOUTS.items() if ranks == 2} | {
    "dp2": {},
    "pp2": {PP: 2},
    "dp2, all in one micro-batch": {"max_tokens": 1000},
    "dp2, one sequence each": {"max_tokens": 1},
    "dp2, prompts not shared": {"packing": {"share_prompts": False}},
    "dp2, padded": ROWS,
    "tp2, padded": SEQUENCE | ROWS,
    "cp2, padded": {CP: 2} | ROWS,
    "several turns, dp2": {"masked": True},
    "several turns, cp2": {"masked": True, CP: 2},
    "several turns, tp2, padded": {"masked": True} | SEQUENCE | ROWS,
    "dp2, recomputed": RECOMPUTED,
    "pp2, recomputed": {PP: 2} | RECOMPUTED,
    "pp2 vpp2, recomputed": {PP: 2, VPP: 2} | RECOMPUTED,
    "pp2, one layer recomputed": {PP: 2} | RECOMPUTED | {"recompute_method": "block"},
    "pp2, padded, recomputed": {PP: 2} | RECOMPUTED | ROWS,
    "dense layers, pp2": {"folder": "mixed", PP: 2},
    "dense layers, ep2": {"folder": "mixed", EP: 2},
    "off-policy, pp2": {"old_folder": "old", PP: 2},
    "off-policy, cp2": {"old_folder": "old", CP: 2},
    "penalty and bonus, ep2": {"reference_folder": "old", "algorithm": PENALTY, EP: 2},
}
SLOW_CASES = {name: sizes for name, (ranks, sizes) in MOE_LAYOUTS.items() if ranks == 4} | {
    "ep2 dp2": {EP: 2},
    "tp2 sp cp2": SEQUENCE | {CP: 2},
    "tp2 sp cp2, padded": SEQUENCE | {CP: 2} | ROWS,
    "tp2 sp pp2 vpp2, recomputed": SEQUENCE | {PP: 2, VPP: 2} | RECOMPUTED,
    "tp2 sp pp2, whole experts": SEQUENCE | {PP: 2, EP: 2, ETP: 1},
    "penalty and bonus, tp2 sp pp2": SEQUENCE | {"reference_folder": "old", "algorithm": PENALTY, PP: 2},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in ("moe", "mixed", "old")}
    save_model("qwen3_moe", folders["moe"], tie_word_embeddings=True)
    save_model("qwen3_moe_mixed", folders["mixed"], tie_word_embeddings=True)
    save_older_version(folders["moe"], folders["old"])
    return folders


def assert_all_equal_the_reference(folders, ranks: int, cases: dict[str, dict]) -> None:
    wanted = []
    for options in cases.values():
        arguments = {"folder": "moe", "replays": True, **options}
        check = "check_regularized_gradient" if "reference_folder" in options else "check_gradient"
        wanted.append([check, {key: folders[value] if key.endswith("folder") else value for key, value in arguments.items()}])
    answers = run_ranks(ranks, "tests.ranks.step:check_all", timeout=900, cases=wanted)
    wrong = {name: answer for name, answer in zip(cases, answers, strict=True) if answer["worst"] > 1e-4}
    assert not wrong, wrong


def test_gradient_equals_the_reference_with_those_experts(folders):
    assert_all_equal_the_reference(folders, 2, CASES)


@pytest.mark.slow
def test_gradient_equals_the_reference_on_four_ranks(folders):
    assert_all_equal_the_reference(folders, 4, SLOW_CASES)
