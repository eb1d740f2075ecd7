"""Megatron checkpoints: bit-exact through any two layouts, and nothing but this model's own undamaged files is opened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_espo.errors import InputError
from megatron_espo.mcore import checkpoint
from tests.distributed import ROOT, run_ranks
from tests.weights_models import save_model

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
VPP = PP2 | {"virtual_pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tied Qwen3 and an untied Llama with 131 tokens (132 rows at TP=2), and their checkpoints written at TP=2."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_model("qwen3", folder / "tied", tie_word_embeddings=True)
    save_model("llama", folder / "untied")
    names = ("tied", "untied")
    run_ranks(2, "tests.ranks.checkpoint:write", pairs=[[str(folder / n), str(folder / f"{n}-tp2")] for n in names], **TP2)
    return folder


def read_back(work, written: str, nproc: int, **sizes) -> list[float]:
    """Load both checkpoints in another layout, export, compare every bit; returns the largest padding value of each."""
    label = f"{written}-{nproc}-{'-'.join(map(str, sizes.values()))}"
    triples = [[str(work / n), str(work / f"{n}-{written}"), str(work / f"{n}-{label}")] for n in ("tied", "untied")]
    padding = run_ranks(nproc, "tests.ranks.checkpoint:read", triples=triples, **sizes)
    for folder, _, out in triples:
        assert_same_weights(folder, out)
    return padding


def assert_same_weights(folder, out) -> None:
    expected, found = (load_file(Path(path, "model.safetensors")) for path in (folder, out))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("nproc, sizes", [(1, {}), (2, PP2), (2, VPP)], ids=["one rank", "pp2", "vpp2"])
def test_written_at_tp2_reads_anywhere(work, nproc, sizes):
    read_back(work, "tp2", nproc, **sizes)


def test_experts_written_at_ep2_read_at_pp2(tmp_path):
    names = ("qwen3_moe", "qwen3_moe_mixed")
    for name in names:
        save_model(name, tmp_path / name)
    triples = [[str(tmp_path / name), str(tmp_path / f"{name}-ep2"), str(tmp_path / f"{name}-pp2")] for name in names]
    pairs = [triple[:2] for triple in triples]
    run_ranks(2, "tests.ranks.checkpoint:write", pairs=pairs, expert_model_parallel_size=2)
    run_ranks(2, "tests.ranks.checkpoint:read", triples=triples, **PP2)
    for folder, _, out in triples:
        assert_same_weights(folder, out)


def test_padding_rows_appear_as_zeros(work):
    """131 rows written on one rank, 132 read at TP=2: the row that no file has is zero."""
    pairs = [[str(work / n), str(work / f"{n}-tp1")] for n in ("tied", "untied")]
    run_ranks(1, "tests.ranks.checkpoint:write", pairs=pairs)
    assert read_back(work, "tp1", 2, **TP2) == [0.0, 0.0]


def test_missing_and_superfluous_parameters_are_named(work):
    answer = run_ranks(1, "tests.ranks.checkpoint:read_one_short", folder=str(work / "tied"), checkpoint=str(work / "tied-tp2"))
    assert "lacks ['extra_scale']" in answer and "has besides ['decoder.final_layernorm.weight']" in answer, answer


def hf_config(work, name: str) -> dict:
    return json.loads((work / name / "config.json").read_text())


def test_another_models_checkpoint_is_refused_by_its_keys(work):
    with pytest.raises(InputError, match=r"architecture LlamaForCausalLM \(checkpoint: Qwen3ForCausalLM\).*tie_word_embeddings"):
        checkpoint.read_manifest(work / "tied-tp2", hf_config(work, "untied"))
    with pytest.raises(InputError, match=r"another model's: rotary_base 5 \(checkpoint: 10000.0\)$"):
        changed = hf_config(work, "tied") | {"rope_parameters": None, "rope_theta": 5}
        checkpoint.read_manifest(work / "tied-tp2", changed)
    checkpoint.read_manifest(work / "tied-tp2", hf_config(work, "tied") | {"transformers_version": "0", "dtype": "bfloat16"})


def test_missing_foreign_and_newer_checkpoints_are_refused(work, tmp_path):
    config = hf_config(work, "tied")
    with pytest.raises(InputError, match="got no such folder"):
        checkpoint.read_manifest(tmp_path / "nowhere", config)
    (tmp_path / ".metadata").write_bytes(b"a pickle")
    with pytest.raises(InputError, match="got a folder without one"):
        checkpoint.read_manifest(tmp_path, config)
    for content, message in (("[]", "expected a checkpoint's manifest"), ('{"version": 2, "model": {}}', "version 1, got 2")):
        (tmp_path / checkpoint.MANIFEST_NAME).write_text(content)
        with pytest.raises(InputError, match=message):
            checkpoint.read_manifest(tmp_path, config)


@pytest.mark.parametrize("damage", ["flipped byte", "missing file", "added file"])
def test_damaged_checkpoint_is_refused(work, damage):
    folder = work / "untied-tp2"
    manifest = checkpoint.read_manifest(folder, hf_config(work, "untied"))
    checkpoint.verify_files(folder, manifest)
    assert ".metadata" in manifest["files"]
    file = folder / ("new.distcp" if damage == "added file" else sorted(manifest["files"])[-1])
    before = file.read_bytes() if file.exists() else None
    try:
        if damage == "missing file":
            file.unlink()
        else:
            content = bytearray(before or b"x")
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        with pytest.raises(InputError, match=file.name):
            checkpoint.verify_files(folder, manifest)
    finally:
        file.write_bytes(before) if before else file.unlink()


def convert(nproc: int, *arguments) -> subprocess.CompletedProcess:
    """The command, under torchrun where it takes several ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)] if nproc > 1 else []
    command = [sys.executable, *launcher, "-m", "megatron_espo", "convert", *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


def test_command_there_and_back(work, tmp_path):
    """Two ranks write, one reads; what is there already is refused and kept."""
    (work / "untied" / "tokenizer.json").write_text("{}")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model:\n  path: {work / 'untied'}\n  dtype: float32\ndata:\n  prompts: reasoning_gym:chain_sum\n"
        "rollout:\n  max_response_tokens: 8\n"
    )
    there, back = tmp_path / "new" / "megatron", tmp_path / "hf"
    done = convert(2, "to-megatron", config, there, "megatron.tensor_model_parallel_size=2")
    assert done.returncode == 0, done.stderr
    assert not there.with_name("megatron.partial").exists()
    done = convert(1, "to-hf", config, there, back)
    assert done.returncode == 0, done.stderr
    assert_same_weights(work / "untied", back)
    for arguments in (("to-megatron", config, back), ("to-hf", config, there, back)):
        refused = convert(1, *arguments)
        assert refused.returncode == 2 and f"error: {back}: expected a path where nothing is yet" in refused.stderr, refused
    assert_same_weights(work / "untied", back)
