"""Weight updates from Megatron ranks into a real engine: verified, repeated or refused."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
from safetensors.torch import load_file

from megatron_espo.distributed.checksum import tensor_checksum
from megatron_espo.rollout.engine import Generation
from megatron_espo.weights.verification import CanarySample, canary_gap, wrong_tensors
from tests.support.distributed import run_ranks
from tests.support.ranks.sync import PROMPT_IDS
from tests.support.real_engine import fresh_engine, living_in_group
from tests.support.tiny import save_tiny_model

# vLLM's latent attention on a CPU takes a latent vector of 512 and a rotary key of 64 columns.
# Without YaRN the log-probs of vLLM 0.32 differ from those of transformers.
LATENT = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
# Family, sizes, layers with experts.
EXPERTS = [
    ("qwen3_moe", {"num_experts": 4}, 2),
    ("glm4_moe", {"n_routed_experts": 4, "use_qk_norm": True, "tie_word_embeddings": False}, 1),
    ("deepseek_v3", LATENT, 1),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> str:
    """A model with biases and a separate output layer."""
    folder = tmp_path_factory.mktemp("qwen2")
    return str(save_tiny_model(folder, "qwen2", tie_word_embeddings=False, hidden_size=128))


# -- ranks and engines --------------------------------------------------------------------


@pytest.mark.slow
def test_syncs_are_verified_and_a_killed_engine_comes_back(untied):
    answer = run_ranks(
        2, "tests.support.ranks.sync:sync_and_recover", folder=untied, kill=True, pipeline=2
    )
    count = len(load_file(Path(untied, "model.safetensors")))
    # Versions 0 and 2 by rollout.verify_every=2. In version 4 the engine was killed and restarted.
    verified = [metrics.get("sync/verified_tensors") for metrics in answer["metrics"]]
    assert verified == [count, None, count, None, count]
    assert [metrics["sync/restarts"] for metrics in answer["metrics"]] == [0, 0, 0, 0, 1]
    for metrics in answer["metrics"]:
        assert 0 < metrics["mismatch/canary"] < 1e-4 and metrics["time/canary_s"] > 0
    assert answer["gap"] < 1e-4


@pytest.mark.slow
def test_engines_that_fail_asleep_or_on_waking_come_back(folder):
    metrics = run_ranks(2, "tests.support.ranks.turns:sleep_and_fail", folder=folder, timeout=900)
    assert [m["sync/restarts"] for m in metrics] == [0, 0, 2, 0]
    # Every new process of the engine is verified.
    assert [m.get("sync/verified_tensors") for m in metrics] == [20, None, 20, 20]
    assert all(0 < m["mismatch/canary"] < 1e-4 for m in metrics)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "sizes", "layers"), EXPERTS)
def test_two_workers_serve_the_experts_that_were_sent(tmp_path, family, sizes, layers):
    """Experts of 72 columns over two workers: vLLM pads the 36 of each to 64, and packs them."""
    sizes = sizes | {"num_experts_per_tok": 2, "moe_intermediate_size": 72, "norm_topk_prob": True}
    moe = str(save_tiny_model(tmp_path / "moe", family, **sizes))
    answer = run_ranks(
        2,
        "tests.support.ranks.sync:sync_two_workers",
        folder=moe,
        out=str(tmp_path / "export"),
        expert=2,
    )
    dense = {name for name in answer["sent"] if ".experts." not in name}
    assert len(answer["sent"]) - len(dense) == layers * 4 * 3
    assert answer["metrics"]["sync/verified_tensors"] == len(dense)
    fresh, served = fresh_engine(tmp_path / "export", tmp_path, PROMPT_IDS, seed=3)
    assert dense <= served.keys()
    for (ids, logprobs), generation in zip(answer["samples"], fresh, strict=True):
        assert ids == generation.token_ids.tolist()
        assert generation.logprobs.tolist() == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "glm4"])
def test_two_workers_serve_what_a_fresh_engine_loads_from_the_export(tmp_path, family):
    folder, out = str(save_tiny_model(tmp_path / "model", family)), str(tmp_path / "export")
    count = len(load_file(Path(folder, "model.safetensors")))
    answer = run_ranks(2, "tests.support.ranks.sync:sync_two_workers", folder=folder, out=out)
    fresh, served = fresh_engine(out, tmp_path, PROMPT_IDS, seed=3)
    for (ids, logprobs), generation in zip(answer["samples"], fresh, strict=True):
        assert ids == generation.token_ids.tolist()
        assert generation.logprobs.tolist() == pytest.approx(logprobs, abs=1e-4)
    # The tensors of trainer and fresh engine have equal checksums.
    assert wrong_tensors(answer["sent"], served) is None and served.keys() >= answer["sent"].keys()
    assert answer["metrics"]["sync/verified_tensors"] == len(answer["sent"]) == count
    assert answer["processes"] >= 3 and answer["left"] == []


@pytest.mark.slow
def test_failed_syncs_say_version_rank_phase_and_tensor(folder):
    found = run_ranks(2, "tests.support.ranks.sync:faults", folder=folder, timeout=900)
    served = r"are not served as they were sent: model\.embed_tokens\.weight, .*\(and \d+ more\)"
    expected = {
        "nothing loaded at start": "weights of version 0: rank 0, phase verify: "
        rf"21 of 21 tensors {served}\ngave up after 0 engine restarts",
        "nothing loaded later": "weights of version 2: rank 0, phase canary: "
        r"mean \|engine - trainer\| log-prob gap \S+ nats, above 0\.001; "
        r"prompt 'row-\d', token \d \(id \d+\): engine -\S+, trainer -",
        "damaged": r"weights of version 4: rank 0, phase transfer: the rollout engine failed: "
        r".*weight 'model\.layers\.1\.self_attn\.k_proj\.weight' arrived damaged: checksum",
    }
    for fault, pattern in expected.items():
        assert re.match(f"WeightSyncError: {pattern}", found[fault]), (fault, found[fault])


@pytest.mark.slow
def test_exporters_are_checked_before_anything_is_sent(folder):
    found = run_ranks(2, "tests.support.ranks.sync:exporter_faults", folder=folder)
    assert re.match(
        r"InputError: .*up_proj.weight: shape \(64, 128\), expected \(128, 64\)",
        found["transposed"],
    )
    assert (
        "1.mlp.up_proj.weight: shape missing" in found["renamed"]
        and "1.mlp.upper_proj.weight: shape (128, 64), expected no tensor" in found["renamed"]
    )
    assert "phase gather" in found["fickle"] and "as in its first pass" in found["fickle"]
    assert (
        found["whole"]["sync/verified_tensors"] == 20 and found["whole"]["mismatch/canary"] < 1e-4
    )


@pytest.mark.slow
def test_engine_dies_with_a_rank_that_is_killed_inside_a_sync(folder, tmp_path):
    began = time.monotonic()
    with pytest.raises(AssertionError, match="SIGKILL|exitcode: -9|Signal 9"):
        run_ranks(
            2,
            "tests.support.ranks.sync:die_midway",
            folder=folder,
            pid_file=str(tmp_path / "pid"),
            timeout=360,
        )
    assert time.monotonic() - began < 300  # shorter than a collective's timeout
    engine, processes = map(int, (tmp_path / "pid").read_text().split())
    assert processes >= 3  # the engine and its two workers
    deadline = time.monotonic() + 60
    while living_in_group(engine):
        assert time.monotonic() < deadline, "a process of the engine outlived its owner"
        time.sleep(0.1)


@pytest.mark.parametrize("rank, limit", [(1, 4), pytest.param(0, 16, marks=pytest.mark.slow)])
def test_a_rank_that_hangs_inside_a_sync_is_named_in_time(folder, tmp_path, rank, limit):
    with pytest.raises(AssertionError, match="freeze_midway on 2 ranks failed"):
        run_ranks(
            2,
            "tests.support.ranks.sync:freeze_midway",
            folder=folder,
            rank=rank,
            out=str(tmp_path / "out"),
            timeout=450,
        )
    message, seconds = json.loads((tmp_path / "out").read_text())
    assert re.match(
        rf"WeightSyncError: weights: phase transfer: rank {rank} .* for the weights of model\.",
        message,
    ), message
    assert limit <= seconds < limit + 30


# -- pure functions -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksums_add_up_over_shards_and_detect_every_change(dtype):
    tensor = torch.randn(24, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = tensor_checksum(tensor)
    blocks = [(r, c) for r in (0, 8, 16) for c in (0, 5)]
    assert (
        sum(tensor_checksum(tensor[r : r + 8, c : c + 5], r, c) for r, c in blocks) % 2**64 == whole
    )
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    for bit in range(bits.itemsize * 8):
        damaged = tensor.clone()
        damaged.view(bits)[17, 3] ^= (
            1 << bit if bit < bits.itemsize * 8 - 1 else torch.iinfo(bits).min
        )
        assert tensor_checksum(damaged) != whole, bit
    assert (
        tensor_checksum(tensor[torch.randperm(24, generator=torch.Generator().manual_seed(1))])
        != whole
    )
    assert tensor_checksum(tensor.T.contiguous().T) == whole
    zeros = torch.tensor([0.0, -0.0, torch.finfo(dtype).tiny / 4], dtype=dtype)
    assert tensor_checksum(zeros) == 0


def test_comparison_names_what_differs():
    sent = {"model.embed_tokens.weight": 1, "b": 2, "experts": 3}
    assert (
        wrong_tensors(sent, {"model.embed_tokens.weight": 1, "b": 2, "lm_head.weight": 1}) is None
    )
    assert "1 of 4 tensors are not served as they were sent: b" in wrong_tensors(sent, {"b": 5})
    assert "lm_head.weight" in wrong_tensors(sent, {"lm_head.weight": 9})
    samples = [
        CanarySample(name, (1,), Generation(np.array(ids), np.array(logprobs), np.array([]), ""))
        for name, ids, logprobs in (("p", [7, 8], [-1.0, -2.0]), ("q", [9], [-3.0]))
    ]
    gap, worst = canary_gap(samples, [[-1.0, -2.5], [-3.1]])
    assert (
        gap == pytest.approx(0.2)
        and worst == "prompt 'p', token 1 (id 8): engine -2.0000, trainer -2.5000"
    )
    gap, worst = canary_gap(samples, [[-1.0, float("nan")], [-3.1]])
    assert gap != gap and "trainer nan" in worst
