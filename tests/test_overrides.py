"""``megatron.overrides`` reaches Megatron-Core's configurations, or is refused with a reason."""

import pytest
import torch

from megatron_espo.errors import InputError
from megatron_espo.megatron.overrides import check_overrides
from tests.support.distributed import run_ranks
from tests.support.weights_models import save_model

FIXED = {"hidden_size": "config.json gives it"}


def test_each_configuration_gets_its_fields():
    given = {"moe_permute_fusion": True, "bucket_size": 1 << 20, "exp_avg_dtype": "bfloat16"}
    transformer, ddp, optimizer = check_overrides(given, FIXED)
    assert transformer == {"moe_permute_fusion": True}
    assert ddp == {"bucket_size": 1 << 20}
    assert optimizer == {"exp_avg_dtype": torch.bfloat16}


def test_a_field_of_two_configurations_reaches_both():
    transformer, ddp, _ = check_overrides({"delay_wgrad_compute": False}, FIXED)
    assert transformer == ddp == {"delay_wgrad_compute": False}


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("moe_permute_fusoin", True, "moe_permute_fusion"),
        ("moe_permute_fusion", "yes", "valid boolean"),
        ("bucket_size", 1.5, "valid integer"),
        ("activation_func", "gelu", "callable"),
        ("exp_avg_dtype", "bf16", "torch dtype"),
        ("timers", 1, "callable"),
        ("hidden_size", 8, "config.json"),
        ("calculate_per_token_loss", False, "schedule"),
        ("lr", 1.0, "optimizer.lr"),
        ("grad_norm_skip_threshold", 10.0, "optimizer.spike_factor"),
    ],
)
def test_what_cannot_be_overridden_is_refused(name, value, part):
    with pytest.raises(InputError, match=rf"megatron\.overrides\.{name}.*{part}"):
        check_overrides({name: value}, FIXED)


def test_weights_are_complete_after_a_step_that_overlaps_their_all_gather(tmp_path):
    for name in ("qwen3", "qwen3_moe"):
        save_model(name, tmp_path / name)
    folders = {"folder": str(tmp_path / "qwen3"), "expert_folder": str(tmp_path / "qwen3_moe")}
    dense, experts, trained = run_ranks(
        2, "tests.support.ranks.resume:check_param_gather", timeout=900, **folders
    )
    assert dense == experts == 0.0 and trained > 1e-3
