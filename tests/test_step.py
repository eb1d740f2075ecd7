"""The gradient of one step through Megatron equals the dense float64 reference, in every layout.

All cases on the same number of ranks share one launch, because launches take most of the time.
"""

import pytest

from tests.support.distributed import run_ranks
from tests.support.weights_models import save_model

TP, PP, VPP = (f"{kind}_model_parallel_size" for kind in ("tensor", "pipeline", "virtual_pipeline"))
CP, EP, ETP = (f"{kind}_parallel_size" for kind in ("context", "expert_model", "expert_tensor"))
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
PACKINGS = {
    "one sequence each": {"max_tokens": 1},
    "all in one": {"max_tokens": 1000},
    "prompts not shared": {"max_tokens": 1000, "packing": APART},
    "padded": {"max_tokens": 40, "packing": PADDED},
    # Three tokens' logits of 131 columns: the head computes logits again, chunk by chunk.
    "head by chunks": {"max_tokens": 1000, "packing": {"head_budget_bytes": 3 * 4 * 131}},
}
FOUR = ("one rank", "tp2", "pp2", "cp2")


def cases() -> dict[str, tuple[int, str, dict]]:
    """Name to ``(ranks, check, arguments)``; folders by name.

    With ``masked``, responses have several turns: tokens between turns have no loss, and later
    tokens attend to them. One of the responses is trained on all tokens.
    """
    found: dict[str, tuple[int, str, dict]] = {}

    def add(name, check="check_gradient", layouts=LAYOUTS, only=None, **arguments):
        for layout in only or layouts:
            ranks, sizes = layouts[layout]
            found[f"{name}, {layout}"] = (ranks, check, {"folder": "new"} | arguments | sizes)

    add("every token trained", only=["one rank", "tp2 sp cp2"])
    add("several turns", masked=True)
    overlap = {"overlap_grad_reduce": True}
    add("gradients reduced during backward", only=["dp2", "pp2 vpp2"], overrides=overlap)
    add("several turns, padded", masked=True, packing=PADDED, max_tokens=40)
    # Old log-probs and groups of an older policy: some groups are clipped and some are not.
    add("off-policy", only=FOUR, masked=True, old_folder="old")
    top_k = {"masked": True, "kept": True, "old_folder": "old"}
    add("top-k", only=["one rank", "tp2 sp", "cp2", "tp2 sp cp2"], **top_k)
    add("top-k, padded", only=["cp2"], packing=PADDED, max_tokens=40, **top_k)
    budget = {"head_budget_bytes": 3 * 4 * 131}
    add("top-k, head by chunks", only=["one rank"], packing=budget, **top_k)
    # An objective that a user adds in one file.
    vespo = {"objective": "examples.vespo:VESPO"}
    add("VESPO", only=["one rank", "cp2"], masked=True, old_folder="old", algorithm=vespo)
    for level in ("token", "sequence"):
        add(
            f"correction by {level}, penalty and bonus",
            "check_regularized_gradient",
            only=["one rank", "tp2", "pp2", "tp2 sp cp2"],
            masked=True,
            reference_folder="old",
            algorithm={"rollout_correction": level, "kl_coef": 0.5, "entropy_coef": 0.3},
        )
    for name, options in PACKINGS.items():
        add(f"micro-batches: {name}", only=["one rank"], masked=True, **options)
    add("update of the distributed optimizer", "check_update", only=[*FOUR, "dp2"])
    add("experts", layouts=MOE_LAYOUTS, folder="moe")
    add("experts and dense layers", layouts=MOE_LAYOUTS, only=["ep2"], folder="mixed")
    add("GLM-4", only=["one rank", "tp2 sp", "pp2", "cp2"], folder="glm4")
    # A frozen bias of the routers, shared experts, a dense first layer.
    glm, shared = {"folder": "glm4_moe"}, ["ep2", "tp2", "ep2 cp2", "pp2 vpp2"]
    add("GLM-4.5", layouts=LAYOUTS | MOE_LAYOUTS, only=["one rank", *shared], **glm)
    add("update of GLM-4.5", "check_update", layouts=MOE_LAYOUTS, only=["ep2"], **glm)
    # Latent attention: the gradient of the rotary key is a sum over tensor-parallel ranks.
    latent = {"layouts": LAYOUTS | MOE_LAYOUTS}
    add("DeepSeek-V2", only=["one rank", "tp2"], folder="deepseek_v2", **latent)
    add("DeepSeek-V3", only=["one rank", *shared], folder="deepseek_v3", **latent)
    # Four ranks: the dense part has four replicas, each expert two.
    found["update with experts, ep2 dp2"] = (4, "check_update", {"folder": "moe", EP: 2})
    return found


CASES = cases()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models: a tied Qwen3 whose vocabulary (131) TP pads, an older version, two with experts.

    No choice of experts is a near tie.
    """
    families = ("glm4", "glm4_moe", "deepseek_v2", "deepseek_v3")
    names = ("new", "old", "moe", "mixed", *families)
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in names}
    for family, name in (("qwen3", "new"), ("qwen3_moe", "moe"), ("qwen3_moe_mixed", "mixed")):
        save_model(family, folders[name], tie_word_embeddings=True)
    for family in families:
        save_model(family, folders[family])
    save_older_version(folders["new"], folders["old"])
    return folders


def save_older_version(folder: str, out: str) -> None:
    """Save slightly different weights."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 2e-4)
    model.save_pretrained(out)


@pytest.fixture(scope="module")
def results(folders):
    """Result of a case; the first case of a number of ranks runs all of them."""
    known: dict[str, dict] = {}

    def result(name: str) -> dict:
        ranks = CASES[name][0]
        if name not in known:
            names = [other for other, case in CASES.items() if case[0] == ranks]
            wanted = [[CASES[n][1], _with_paths(CASES[n][2], folders)] for n in names]
            check = "tests.support.ranks.step:check_all"
            known.update(
                zip(names, run_ranks(ranks, check, timeout=900, cases=wanted), strict=True)
            )
        return known[name]

    return result


def _with_paths(arguments: dict, folders: dict[str, str]) -> dict:
    return {
        key: folders[value] if key.endswith("folder") else value for key, value in arguments.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(results, name):
    assert results(name)["worst"] <= 1e-4, results(name)
