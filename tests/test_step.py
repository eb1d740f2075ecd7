"""One ESPO step's gradient through Megatron equals the dense float64 reference, whatever the layout."""

import pytest

from tests.distributed import run_ranks
from tests.weights_models import save_model

EXPERTS_OVER_2 = {"expert_model_parallel_size": 2}
TP2_SEQUENCE = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
MOE_LAYOUTS = {
    "ep2": (2, EXPERTS_OVER_2),
    "tp2": (2, TP2_SEQUENCE),
    "tp2 ep2, whole experts": (2, TP2_SEQUENCE | EXPERTS_OVER_2 | {"expert_tensor_parallel_size": 1}),
    "tp2 ep2, cut experts": (4, TP2_SEQUENCE | EXPERTS_OVER_2),
    "ep2 cp2": (2, EXPERTS_OVER_2 | {"context_parallel_size": 2}),
    "ep2 pp2": (4, EXPERTS_OVER_2 | {"pipeline_model_parallel_size": 2}),
    "pp2 vpp2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
}
LAYOUTS = {
    "one rank": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2 sequence parallel": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "dp2": (2, {}),
    "cp2": (2, {"context_parallel_size": 2}),
    "pp2 vpp2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "tp2 sequence parallel cp2": (
        4,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2},
    ),
    "pp2 cp2": (4, {"pipeline_model_parallel_size": 2, "context_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny tied Qwen3 with an odd vocabulary (131: padded under TP), and a slightly different older version of it."""
    import torch
    from transformers import AutoModelForCausalLM

    new, old = tmp_path_factory.mktemp("new"), tmp_path_factory.mktemp("old")
    save_model("qwen3", new, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32)
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 2e-4)
    model.save_pretrained(old)
    return str(new), str(old)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_first_step_equals_reference(folders, layout):
    nproc, sizes = LAYOUTS[layout]
    answer = run_ranks(nproc, "tests.ranks.step:check_gradient", folder=folders[0], **sizes)
    assert answer["worst"] <= 1e-4, answer


@pytest.mark.parametrize("layout", ["one rank", "tp2", "pp2", "cp2"])
def test_gradient_off_policy_equals_reference(folders, layout):
    """With old log-probs and groups from a scoring pass of an older policy, some groups clipped and some not."""
    nproc, sizes = LAYOUTS[layout]
    answer = run_ranks(nproc, "tests.ranks.step:check_gradient", folder=folders[0], old_folder=folders[1], **sizes)
    assert answer["worst"] <= 1e-4, answer


@pytest.mark.parametrize("layout", ["one rank", "tp2", "tp2 sequence parallel cp2", "pp2"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradient_with_correction_penalty_and_bonus_equals_reference(folders, layout, level):
    nproc, sizes = LAYOUTS[layout]
    algorithm = {"rollout_correction": level, "kl_coef": 0.5, "entropy_coef": 0.3}
    target = "tests.ranks.step:check_regularized_gradient"
    answer = run_ranks(nproc, target, folder=folders[0], reference_folder=folders[1], algorithm=algorithm, **sizes)
    assert answer["worst"] <= 1e-4, answer


def test_gradient_does_not_depend_on_micro_batches(folders):
    """One sequence a micro-batch, or all packed into one; with and without prompts in common."""
    apart, padded = {"share_prompts": False}, {"share_prompts": False, "padded": True}
    for options in (
        {"max_tokens": 1},
        {"max_tokens": 1000},
        {"max_tokens": 1000, "packing": apart},
        {"max_tokens": 40, "packing": padded},
        # Three tokens' logits of 131 columns: the head computes them again, chunk by chunk.
        {"max_tokens": 1000, "packing": {"head_budget_bytes": 3 * 4 * 131}},
    ):
        answer = run_ranks(1, "tests.ranks.step:check_gradient", folder=folders[0], **options)
        assert answer["worst"] <= 1e-4, (options, answer)


@pytest.mark.parametrize("layout", ["tp2 sequence parallel cp2", "pp2", "dp2"])
def test_gradient_of_padded_rows_equals_reference(folders, layout):
    nproc, sizes = LAYOUTS[layout]
    packing = {"share_prompts": False, "padded": True}
    answer = run_ranks(nproc, "tests.ranks.step:check_gradient", folder=folders[0], packing=packing, max_tokens=40, **sizes)
    assert answer["worst"] <= 1e-4, answer


@pytest.mark.parametrize("layout", ["one rank", "tp2", "pp2", "dp2", "cp2"])
def test_update_of_distributed_optimizer_equals_reference(folders, layout):
    nproc, sizes = LAYOUTS[layout]
    answer = run_ranks(nproc, "tests.ranks.step:check_update", folder=folders[0], **sizes)
    assert answer["worst"] <= 1e-4, answer


@pytest.fixture(scope="module")
def moe_folders(tmp_path_factory):
    """Two tiny Qwen3-MoE: experts everywhere, and in one of four layers. No token's choice of experts is a near-tie."""
    folders = {}
    for family in ("qwen3_moe", "qwen3_moe_mixed"):
        folders[family] = str(tmp_path_factory.mktemp(family))
        save_model(family, folders[family], tie_word_embeddings=True)
    return folders


@pytest.mark.parametrize("layout", MOE_LAYOUTS)
def test_gradient_with_experts_equals_reference(moe_folders, layout):
    nproc, sizes = MOE_LAYOUTS[layout]
    answer = run_ranks(nproc, "tests.ranks.step:check_gradient", folder=moe_folders["qwen3_moe"], **sizes)
    assert answer["worst"] <= 1e-4, answer


def test_gradient_of_a_mixed_stack_equals_reference(moe_folders):
    folder = moe_folders["qwen3_moe_mixed"]
    answer = run_ranks(2, "tests.ranks.step:check_gradient", folder=folder, **EXPERTS_OVER_2)
    assert answer["worst"] <= 1e-4, answer


def test_update_with_experts_equals_reference(moe_folders):
    """Four ranks: the dense part has four replicas, each expert two."""
    answer = run_ranks(4, "tests.ranks.step:check_update", folder=moe_folders["qwen3_moe"], **EXPERTS_OVER_2)
    assert answer["worst"] <= 1e-4, answer
