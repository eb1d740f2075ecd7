"""One ESPO step's gradient through Megatron equals the dense float64 reference, whatever the layout.

All cases on the same number of ranks run in one launch, which is what takes the time.
"""

import pytest

from tests.distributed import run_ranks
from tests.weights_models import save_model

TP, PP, VPP, CP, EP, ETP = (
    f"{kind}_parallel_size"
    for kind in ("tensor_model", "pipeline_model", "virtual_pipeline_model", "context", "expert_model", "expert_tensor")
)
SEQUENCE = {TP: 2, "sequence_parallel": True}
LAYOUTS = {
    "one rank": (1, {}),
    "tp2": (2, {TP: 2}),
    "tp2 sp": (2, SEQUENCE),
    "pp2": (2, {PP: 2}),
    "dp2": (2, {}),
    "cp2": (2, {CP: 2}),
    "pp2 vpp2": (2, {PP: 2, VPP: 2}),
    "tp2 sp cp2": (4, SEQUENCE | {CP: 2}),
    "pp2 cp2": (4, {PP: 2, CP: 2}),
}
MOE_LAYOUTS = {
    "ep2": (2, {EP: 2}),
    "tp2": (2, SEQUENCE),
    "tp2 ep2, whole experts": (2, SEQUENCE | {EP: 2, ETP: 1}),
    "tp2 ep2, cut experts": (4, SEQUENCE | {EP: 2}),
    "ep2 cp2": (2, {EP: 2, CP: 2}),
    "ep2 pp2": (4, {EP: 2, PP: 2}),
    "pp2 vpp2": (2, {PP: 2, VPP: 2}),
}
APART, PADDED = {"share_prompts": False}, {"share_prompts": False, "padded": True}


def cases() -> dict[str, tuple[int, str, dict]]:
    """Name to ``(ranks, check, arguments)``; folders by name."""
    found = {}
    for name, (ranks, sizes) in LAYOUTS.items():
        found[f"first step, {name}"] = (ranks, "check_gradient", {"folder": "new", **sizes})
    # Old log-probs and groups from a scoring pass of an older policy: some groups are clipped and some not.
    for name in ("one rank", "tp2", "pp2", "cp2"):
        ranks, sizes = LAYOUTS[name]
        found[f"off-policy, {name}"] = (ranks, "check_gradient", {"folder": "new", "old_folder": "old", **sizes})
    for name in ("one rank", "tp2", "pp2", "tp2 sp cp2"):
        for level in ("token", "sequence"):
            ranks, sizes = LAYOUTS[name]
            algorithm = {"rollout_correction": level, "kl_coef": 0.5, "entropy_coef": 0.3}
            arguments = {"folder": "new", "reference_folder": "old", "algorithm": algorithm, **sizes}
            found[f"correction by {level}, penalty and bonus, {name}"] = (ranks, "check_regularized_gradient", arguments)
    for name in ("tp2 sp cp2", "pp2", "dp2"):
        ranks, sizes = LAYOUTS[name]
        arguments = {"folder": "new", "packing": PADDED, "max_tokens": 40, **sizes}
        found[f"padded rows, {name}"] = (ranks, "check_gradient", arguments)
    # Several turns: tokens between them have no loss, but the tokens after them attend to them.
    for name, (ranks, sizes) in LAYOUTS.items():
        found[f"several turns, {name}"] = (ranks, "check_gradient", {"folder": "new", "masked": True, **sizes})
        padded = {"packing": PADDED, "max_tokens": 40}
        found[f"several turns, padded, {name}"] = (ranks, "check_gradient", {"folder": "new", "masked": True, **padded, **sizes})
    for name in ("one rank", "tp2", "pp2", "cp2"):
        ranks, sizes = LAYOUTS[name]
        arguments = {"folder": "new", "old_folder": "old", "masked": True, **sizes}
        found[f"several turns, off-policy, {name}"] = (ranks, "check_gradient", arguments)
        algorithm = {"rollout_correction": "sequence", "kl_coef": 0.5, "entropy_coef": 0.3}
        arguments = {"folder": "new", "reference_folder": "old", "algorithm": algorithm, "masked": True, **sizes}
        found[f"several turns, correction, penalty and bonus, {name}"] = (ranks, "check_regularized_gradient", arguments)
    packings = {
        "one sequence each": {"max_tokens": 1},
        "all in one": {"max_tokens": 1000},
        "prompts not shared": {"max_tokens": 1000, "packing": APART},
        "padded": {"max_tokens": 40, "packing": PADDED},
        # Three tokens' logits of 131 columns: the head computes them again, chunk by chunk.
        "head by chunks": {"max_tokens": 1000, "packing": {"head_budget_bytes": 3 * 4 * 131}},
    }
    for name, options in packings.items():
        found[f"micro-batches: {name}"] = (1, "check_gradient", {"folder": "new", **options})
        found[f"several turns, micro-batches: {name}"] = (1, "check_gradient", {"folder": "new", "masked": True, **options})
    for name in ("one rank", "tp2", "pp2", "dp2", "cp2"):
        ranks, sizes = LAYOUTS[name]
        found[f"update of the distributed optimizer, {name}"] = (ranks, "check_update", {"folder": "new", **sizes})
    for name, (ranks, sizes) in MOE_LAYOUTS.items():
        found[f"experts, {name}"] = (ranks, "check_gradient", {"folder": "moe", **sizes})
    found["experts and dense layers, ep2"] = (2, "check_gradient", {"folder": "mixed", EP: 2})
    # Four ranks: the dense part has four replicas, each expert two.
    found["update with experts, ep2 dp2"] = (4, "check_update", {"folder": "moe", EP: 2})
    return found


CASES = cases()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny tied Qwen3 with an odd vocabulary (131: padded under TP), a slightly different older version of it, and two models with experts."""
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in ("new", "old", "moe", "mixed")}
    save_model("qwen3", folders["new"], tie_word_embeddings=True)
    # No token's choice of experts is a near-tie.
    save_model("qwen3_moe", folders["moe"], tie_word_embeddings=True)
    save_model("qwen3_moe_mixed", folders["mixed"], tie_word_embeddings=True)
    save_older_version(folders["new"], folders["old"])
    return folders


def save_older_version(folder: str, out: str) -> None:
    """Slightly different weights."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 2e-4)
    model.save_pretrained(out)


@pytest.fixture(scope="module")
def answers(folders):
    """Runs all cases of a number of ranks when the first of them is asked for."""
    known: dict[str, dict] = {}

    def answer(name: str) -> dict:
        ranks = CASES[name][0]
        if name not in known:
            mine = {n: (check, arguments) for n, (count, check, arguments) in CASES.items() if count == ranks}
            wanted = [[check, _with_paths(arguments, folders)] for check, arguments in mine.values()]
            known.update(zip(mine, run_ranks(ranks, "tests.ranks.step:check_all", timeout=900, cases=wanted), strict=True))
        return known[name]

    return answer


def _with_paths(arguments: dict, folders: dict[str, str]) -> dict:
    return {key: folders[value] if key.endswith("folder") else value for key, value in arguments.items()}


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(answers, name):
    assert answers(name)["worst"] <= 1e-4, answers(name)
