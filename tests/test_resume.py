"""A learner that was saved and loaded goes on bit for bit, with its moments, its step count and its learning rate."""

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import run_ranks
from tests.weights_models import save_model

TRAIN = "tests.ranks.resume:train"
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
VPP = PP2 | {"virtual_pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume") / "model"
    save_model("qwen3", folder, tie_word_embeddings=True)
    return str(folder)


def difference(one, other) -> float:
    a, b = load_file(one), load_file(other)
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize(
    ("ranks", "sizes", "dtype"),
    [(1, {}, "bfloat16"), (2, {}, "float32"), (2, TP2, "bfloat16"), (2, VPP, "float32")],
    ids=["one rank bf16", "dp2", "tp2 bf16", "pp2 vpp2"],
)
def test_continued_equals_uninterrupted_bit_for_bit(model, tmp_path, ranks, sizes, dtype):
    checkpoint, whole, parts = (str(tmp_path / name) for name in ("checkpoint", "whole", "parts"))
    options = sizes | {"dtype": dtype}
    all_metrics = run_ranks(ranks, TRAIN, folder=model, first=1, last=3, out=whole, **options)
    run_ranks(ranks, TRAIN, folder=model, first=1, last=2, save=checkpoint, **options)
    (metrics,) = run_ranks(ranks, TRAIN, folder=model, first=3, last=3, load=checkpoint, out=parts, **options)
    assert difference(whole, parts) == 0.0
    assert metrics == all_metrics[2]
    lrs = [m["optimizer/lr"] for m in all_metrics]
    assert len(set(lrs)) == 3


@pytest.mark.parametrize(
    ("ranks", "sizes"), [(1, {}), (2, TP2), (2, PP2), (4, {})], ids=["dp1", "tp2", "pp2", "dp4"]
)
def test_another_layout_goes_on(model, tmp_path, ranks, sizes):
    """Saved at DP=2, continued elsewhere: the same but for the order of float32 sums."""
    checkpoint, whole, parts = (str(tmp_path / name) for name in ("checkpoint", "whole", "parts"))
    run_ranks(2, TRAIN, folder=model, first=1, last=3, out=whole)
    run_ranks(2, TRAIN, folder=model, first=1, last=2, save=checkpoint)
    run_ranks(ranks, TRAIN, folder=model, first=3, last=3, load=checkpoint, out=parts, **sizes)
    assert difference(whole, parts) < 1e-4
    untrained = tmp_path / "untrained"
    run_ranks(1, TRAIN, folder=model, first=1, last=0, out=str(untrained))
    assert difference(whole, str(untrained)) > 1e-2, "nothing was trained"
    assert torch.isfinite(torch.tensor(difference(whole, parts)))
