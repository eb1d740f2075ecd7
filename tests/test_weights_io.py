"""Hugging Face folders: bad files are refused, and an interrupted export changes nothing."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_espo.errors import InputError
from megatron_espo.weights.hf_io import open_checkpoint
from megatron_espo.weights.hf_writer import write_folder
from megatron_espo.weights.source import ParameterMetadata
from tests.support.ranks.weights import whole_checkpoint
from tests.support.weights_models import load_spec, save_model


@pytest.fixture
def llama(tmp_path):
    """A single-file checkpoint: (folder, specification, tensors)."""
    save_model("llama_tied", tmp_path)
    return tmp_path, load_spec(tmp_path), load_file(tmp_path / "model.safetensors")


def rewrite(folder, tensors) -> None:
    save_file(tensors, folder / "model.safetensors")


def test_slices_are_those_of_the_file(llama):
    folder, spec, tensors = llama
    name = "model.layers.3.mlp.down_proj.weight"
    assert torch.equal(open_checkpoint(spec, folder)(name)[:, 12:24], tensors[name][:, 12:24])


def test_sharded_checkpoint_is_the_same(llama, tmp_path):
    folder, spec, tensors = llama
    save_model("llama_tied", tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    get_slice = open_checkpoint(spec, tmp_path / "sharded")
    for name, tensor in tensors.items():
        assert torch.equal(get_slice(name)[:], tensor)


def test_missing_unknown_and_misshapen_tensors_are_named(llama):
    folder, spec, tensors = llama
    bias = "model.layers.0.self_attn.o_proj.bias"
    rewrite(folder, tensors | {bias: torch.zeros(32)})
    with pytest.raises(InputError, match=f"expected no tensor {bias}"):
        open_checkpoint(spec, folder)
    rewrite(folder, {name: t for name, t in tensors.items() if name != "model.norm.weight"})
    with pytest.raises(InputError, match="expected tensor model.norm.weight"):
        open_checkpoint(spec, folder)
    rewrite(folder, tensors)
    with pytest.raises(InputError, match=r"expected shape \(132, 32\) .*got \(131, 32\)"):
        open_checkpoint(replace(spec, vocab_size=132), folder)


def test_redundant_tensors_of_old_exports_are_ignored(llama):
    folder, spec, tensors = llama
    redundant = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.zeros(4),
    }
    rewrite(folder, tensors | redundant)
    open_checkpoint(spec, folder)
    rewrite(folder, tensors)
    with pytest.raises(InputError, match="expected tensor lm_head.weight"):
        open_checkpoint(replace(spec, tie_word_embeddings=False), folder)


def test_a_tied_model_with_another_head_in_its_file_is_refused(llama):
    folder, spec, tensors = llama
    head = tensors["model.embed_tokens.weight"].clone()
    head[130, 31] += 1
    rewrite(folder, tensors | {"lm_head.weight": head})
    with pytest.raises(InputError, match="tie_word_embeddings true, but lm_head.weight differs"):
        open_checkpoint(spec, folder)
    open_checkpoint(replace(spec, tie_word_embeddings=False), folder)


def test_unreadable_folders_are_named(llama, tmp_path):
    folder, spec, _ = llama
    with pytest.raises(InputError, match="expected model.safetensors or .*save_pretrained"):
        open_checkpoint(spec, tmp_path / "nowhere")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="bytes in .*model.safetensors, as its header says"):
        open_checkpoint(spec, folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="expected a JSON object with weight_map"):
        open_checkpoint(spec, folder)


STREAM = [(f"tensor{i}", torch.full((10,), float(i))) for i in range(4)]
METADATA = [ParameterMetadata(name, tensor.dtype, (10,)) for name, tensor in STREAM]


@pytest.fixture
def source_dir(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text('{"torch_dtype": "bfloat16", "hidden_size": 32}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("old weights")
    return folder


@pytest.mark.parametrize("limit,files", [(40, 4), (119, 2), (1 << 20, 1)])
def test_files_are_bounded_and_complete(tmp_path, source_dir, limit, files):
    out = tmp_path / "runs" / "out"
    write_folder(METADATA, iter(STREAM), out, source_dir, torch.float32, limit)
    assert json.loads((out / "config.json").read_text()) == {
        "torch_dtype": "float32",
        "hidden_size": 32,
    }
    assert len(list(out.glob("*.safetensors"))) == files
    assert {p.name for p in out.iterdir() if p.suffix == ".bin" or "token" in p.name} == {
        "tokenizer.json"
    }
    stored = whole_checkpoint(out)
    assert stored.keys() == dict(STREAM).keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in STREAM)


def test_weights_are_as_readable_as_the_configuration(tmp_path, source_dir):
    out = tmp_path / "out"
    write_folder(METADATA, iter(STREAM), out, source_dir, torch.float32, 40)
    modes = {file.stat().st_mode for file in out.iterdir()}
    assert len(modes) == 1


def test_the_export_has_the_tokenizer_of_the_run(tmp_path, source_dir):
    tokenizer, out = tmp_path / "tokenizer", tmp_path / "out"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text('{"other": 1}')
    (tokenizer / "chat_template.jinja").write_text("{{ messages }}")
    generation = '{"eos_token_id":  [7, 9]}'
    (source_dir / "generation_config.json").write_text(generation)
    options = (source_dir, torch.float32, 1 << 20)
    write_folder(METADATA, iter(STREAM), out, *options, tokenizer=str(tokenizer))
    assert (out / "generation_config.json").read_text() == generation
    assert (out / "tokenizer.json").read_text() == '{"other": 1}'
    assert (out / "chat_template.jinja").is_file()
    (tmp_path / "spm.model").write_bytes(b"model")
    write_folder(METADATA, iter(STREAM), out, *options, tokenizer=str(tmp_path / "spm.model"))
    assert (out / "tokenizer.model").read_bytes() == b"model"
    assert not (out / "tokenizer.json").exists()


def test_an_interrupted_export_keeps_the_earlier_one(tmp_path, source_dir):
    out = tmp_path / "out"
    write_folder(METADATA, iter(STREAM), out, source_dir, torch.float32, 40)
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def interrupted():
        yield from STREAM[:2]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(METADATA, interrupted(), out, source_dir, torch.float32, 40)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    write_folder(
        METADATA,
        ((name, tensor + 1) for name, tensor in STREAM),
        out,
        source_dir,
        torch.float32,
        1 << 20,
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    assert torch.equal(whole_checkpoint(out)["tensor3"], STREAM[3][1] + 1)
