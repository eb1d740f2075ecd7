"""Offloading between steps: training is the same bit for bit, and device memory is freed."""

import pytest
import torch

from megatron_espo.megatron.reference import ReferencePolicy
from tests.support.distributed import run_ranks
from tests.support.weights_models import save_model

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
VPP = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
BF16, PLAIN = {"dtype": "bfloat16"}, {"optimizer": {"use_distributed_optimizer": False}}
# On two ranks. The dense model has tied embeddings.
CASES = {
    "dp2": {"model": "dense"},
    "dp2, bf16": {"model": "dense"} | BF16,
    "dp2, plain optimizer, bf16": {"model": "dense"} | PLAIN | BF16,
    "dp2, penalty, bf16": {"model": "dense", "algorithm": {"kl_coef": 0.5}} | BF16,
    "tp2, bf16": {"model": "dense", "sizes": TP2} | BF16,
    "pp2 vpp2, bf16": {"model": "dense", "sizes": VPP} | BF16,
    "ep2, bf16": {"model": "moe", "sizes": EP2} | BF16,
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, dict]:
    """The results of all cases, from one launch."""
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in ("dense", "moe")}
    save_model("qwen3", folders["dense"], tie_word_embeddings=True)
    save_model("qwen3_moe", folders["moe"])
    found = run_ranks(
        2,
        "tests.support.ranks.offload:check_all",
        timeout=900,
        folders=folders,
        cases=list(CASES.values()),
    )
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_training_is_the_same_bit_for_bit(answers, name):
    for rank, (differ, same_metrics, same_names, moved) in enumerate(answers[name]["ranks"]):
        assert not differ and same_metrics and same_names, (rank, differ)
        assert moved, "nothing was trained"


@pytest.mark.parametrize("name", CASES)
def test_offloading_frees_memory(answers, name):
    freed, is_float32 = answers[name]["freed"], "bf16" not in name
    assert sum(freed.values()) == answers[name]["held"]
    assert freed["gradients"] == freed["weights"] * (1 if is_float32 else 2)
    assert answers[name]["host"] == freed["optimizer"] + freed["weights"]
    if "ep2" in name:  # two replicas of the dense part, one of the experts
        return
    replicas = 2 if name.startswith("dp2") and "plain" not in name else 1
    # Two moments, and a float32 copy of bf16 weights. DDP's buffers have some percent of padding.
    assert freed["optimizer"] == pytest.approx(
        freed["gradients"] * (2 if is_float32 else 3) / replicas, rel=0.1
    )


def test_the_reference_policy_swaps_weights_and_has_one_host_copy():
    """Also with parameters of 2 and 4 bytes, as the float32 biases of routers."""
    draw = torch.Generator().manual_seed(1)
    tensors = [torch.randn(3, generator=draw).bfloat16(), torch.randn(2, 5, generator=draw)]
    chunk = torch.nn.ParameterList(tensors)
    parameters, wanted = list(chunk), [tensor.clone() for tensor in tensors]
    reference = ReferencePolicy([chunk])
    storages = {w.untyped_storage().data_ptr(): w.untyped_storage() for w in reference._weights}
    assert sum(storage.nbytes() for storage in storages.values()) == 3 * 2 + 10 * 4
    for step in (1, 2):
        with torch.no_grad():
            [parameter.add_(1) for parameter in parameters]
        own = [parameter.detach().clone() for parameter in parameters]
        with pytest.raises(KeyError), reference.swapped_in():
            assert all(map(torch.equal, parameters, wanted)), step
            raise KeyError
        assert all(map(torch.equal, parameters, own)), step
