"""Megatron checkpoints load bit for bit in any layout; other or damaged files are refused."""

import contextlib
import errno
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_espo.errors import InputError
from megatron_espo.megatron import checkpoint
from megatron_espo.models.registry import read_spec
from tests.support.distributed import ROOT, run_ranks
from tests.support.weights_models import save_model

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
VPP = PP2 | {"virtual_pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tied Qwen3 and an untied Llama with 131 tokens (132 rows at TP=2), written at TP=2."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save_model("qwen3", folder / "tied", tie_word_embeddings=True)
    save_model("llama", folder / "untied")
    names = ("tied", "untied")
    run_ranks(
        2,
        "tests.support.ranks.checkpoint:write",
        pairs=[[str(folder / n), str(folder / f"{n}-tp2")] for n in names],
        **TP2,
    )
    return folder


def read_back(work, written: str, nproc: int, **sizes) -> list[float]:
    """Load both checkpoints in another layout, export, and compare; return the largest padding."""
    label = f"{written}-{nproc}-{'-'.join(map(str, sizes.values()))}"
    triples = [
        [str(work / n), str(work / f"{n}-{written}"), str(work / f"{n}-{label}")]
        for n in ("tied", "untied")
    ]
    padding = run_ranks(nproc, "tests.support.ranks.checkpoint:read", triples=triples, **sizes)
    for folder, _, out in triples:
        assert_same_weights(folder, out)
    return padding


def assert_same_weights(folder, out) -> None:
    expected, found = (load_file(Path(path, "model.safetensors")) for path in (folder, out))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    "nproc, sizes", [(1, {}), (2, PP2), (2, VPP)], ids=["one rank", "pp2", "vpp2"]
)
def test_a_tp2_checkpoint_loads_in_other_layouts(work, nproc, sizes):
    read_back(work, "tp2", nproc, **sizes)


def test_experts_saved_at_ep2_load_at_pp2(tmp_path):
    names = ("qwen3_moe", "qwen3_moe_mixed")
    for name in names:
        save_model(name, tmp_path / name)
    triples = [
        [str(tmp_path / name), str(tmp_path / f"{name}-ep2"), str(tmp_path / f"{name}-pp2")]
        for name in names
    ]
    pairs = [triple[:2] for triple in triples]
    run_ranks(2, "tests.support.ranks.checkpoint:write", pairs=pairs, expert_model_parallel_size=2)
    run_ranks(2, "tests.support.ranks.checkpoint:read", triples=triples, **PP2)
    for folder, _, out in triples:
        assert_same_weights(folder, out)


def test_a_save_that_fails_in_the_background_is_an_error_on_every_rank(work, tmp_path):
    target = "tests.support.ranks.checkpoint:fail_in_the_background"
    errors = run_ranks(2, target, folder=str(work / "tied"), out=str(tmp_path / "out"), **TP2)
    expected = "rank 1 could not write its part: [Errno 28] No space left on device"
    assert all(expected in error for error in errors), errors
    assert not (tmp_path / "out").exists()


def refuse(number: int):
    def call(*args):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("without", ["nothing", "open", "pwrite"])
def test_files_are_equal_with_and_without_direct_io(tmp_path, monkeypatch, without):
    """Items of all lengths, with headers between them; the digest is the file's."""
    if without != "nothing":
        monkeypatch.setattr(checkpoint.os, without, refuse(errno.EINVAL))
    chance, path, expected = random.Random(1), tmp_path / "file", b""
    sizes = [0, 1, 4095, 4096, 1 << 18, (1 << 18) + 1, 4 << 20, (4 << 20) + 1, 9_000_001]
    with contextlib.closing(checkpoint._Hashing(str(path))) as hashing, path.open("wb") as file:
        for size in sizes * 2:
            stream, _ = hashing.transform_save_stream(None, file)
            for part in (chance.randbytes(chance.randrange(2000)), chance.randbytes(size)):
                assert stream.write(memoryview(part)) == len(part)
                expected += part
            stream.close()
            assert file.tell() == len(expected)
    assert path.read_bytes() == expected
    assert hashing.digest.hexdigest() == hashlib.sha256(expected).hexdigest()


def test_direct_io_writes_whole_blocks(tmp_path, monkeypatch):
    written, pwrite = [], os.pwrite

    def record(file, data, offset) -> int:
        written.append((len(data), offset))
        return pwrite(file, data, offset)

    monkeypatch.setattr(checkpoint.os, "O_DIRECT", 0)  # for file systems without it
    monkeypatch.setattr(checkpoint.os, "pwrite", record)
    path = tmp_path / "file"
    with contextlib.closing(checkpoint._Hashing(str(path))) as hashing, path.open("wb") as file:
        stream, _ = hashing.transform_save_stream(None, file)
        for size in (5, 9_000_001, 7, 1 << 20):
            stream.write(memoryview(bytes(size)))
    assert sum(size for size, _ in written) > 9_900_000
    assert all(size % 4096 == offset % 4096 == 0 for size, offset in written)


def test_a_full_disk_is_an_error_of_direct_io(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.os, "O_DIRECT", 0)
    monkeypatch.setattr(checkpoint.os, "pwrite", refuse(errno.ENOSPC))
    path = tmp_path / "file"
    with contextlib.closing(checkpoint._Hashing(str(path))) as hashing, path.open("wb") as file:
        stream, _ = hashing.transform_save_stream(None, file)
        with pytest.raises(OSError, match="No space left"):
            stream.write(memoryview(bytes(1 << 20)))


def test_padding_rows_without_values_are_zero(work):
    """One rank writes 131 rows; TP=2 reads 132."""
    pairs = [[str(work / n), str(work / f"{n}-tp1")] for n in ("tied", "untied")]
    run_ranks(1, "tests.support.ranks.checkpoint:write", pairs=pairs)
    assert read_back(work, "tp1", 2, **TP2) == [0.0, 0.0]


def test_missing_and_unknown_parameters_are_named(work):
    message = run_ranks(
        1,
        "tests.support.ranks.checkpoint:read_one_short",
        folder=str(work / "tied"),
        checkpoint=str(work / "tied-tp2"),
    )
    assert "lacks ['extra_scale']" in message, message
    assert "has besides ['decoder.final_layernorm.weight']" in message, message


def spec(work, name: str, **changes):
    return read_spec(json.loads((work / name / "config.json").read_text()) | changes)


def test_a_checkpoint_of_another_model_is_refused(work):
    with pytest.raises(
        InputError,
        match=r"LlamaForCausalLM \(checkpoint: Qwen3ForCausalLM\).*tie_word_embeddings",
    ):
        checkpoint.read_manifest(work / "tied-tp2", spec(work, "untied"))
    with pytest.raises(
        InputError, match=r"another model's: rotary_base 5 \(checkpoint: 10000.0\)$"
    ):
        changed = spec(work, "tied", rope_parameters=None, rope_theta=5)
        checkpoint.read_manifest(work / "tied-tp2", changed)
    checkpoint.read_manifest(
        work / "tied-tp2",
        spec(work, "tied", transformers_version="0", dtype="bfloat16"),
    )


def test_missing_foreign_and_newer_checkpoints_are_refused(work, tmp_path):
    config = spec(work, "tied")
    with pytest.raises(InputError, match="got no such folder"):
        checkpoint.read_manifest(tmp_path / "nowhere", config)
    (tmp_path / ".metadata").write_bytes(b"a pickle")
    with pytest.raises(InputError, match="got a folder without one"):
        checkpoint.read_manifest(tmp_path, config)
    for content, message in (
        ("[1]", "expected a JSON object"),
        ('{"version": 2, "model": {}}', "version 1, got 2"),
    ):
        (tmp_path / checkpoint.MANIFEST_NAME).write_text(content)
        with pytest.raises(InputError, match=message):
            checkpoint.read_manifest(tmp_path, config)


@pytest.mark.parametrize("damage", ["flipped byte", "missing file", "added file"])
def test_a_damaged_checkpoint_is_refused(work, damage):
    folder = work / "untied-tp2"
    manifest = checkpoint.read_manifest(folder, spec(work, "untied"))
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
    """Run the command, with torchrun for several ranks."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
        if nproc > 1
        else []
    )
    command = [sys.executable, *launcher, "-m", "megatron_espo", "convert", *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=720)


@pytest.mark.slow
def test_convert_command_round_trip(work, tmp_path):
    """Two ranks write, one rank reads; existing files are refused and kept."""
    (work / "untied" / "tokenizer.json").write_text("{}")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{path: {work / 'untied'}, dtype: float32}}\n"
        "data: {prompts: reasoning_gym:chain_sum}\nrollout: {max_response_tokens: 8}\n"
    )
    there, back = tmp_path / "new" / "megatron", tmp_path / "hf"
    done = convert(2, "to-megatron", config, there, "megatron.tensor_model_parallel_size=2")
    assert done.returncode == 0, done.stderr
    assert not there.with_name("megatron.partial").exists()
    done = convert(1, "to-hf", config, there, back)
    assert done.returncode == 0, done.stderr
    assert_same_weights(work / "untied", back)
    refused = convert(1, "to-hf", config, there, back)
    message = f"error: {back}: expected a path where nothing is yet"
    assert refused.returncode == 2 and message in refused.stderr, refused
    assert_same_weights(work / "untied", back)
