"""Load, stream and export Megatron's model in several layouts; compare with transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.distributed import run_ranks
from tests.support.weights_models import FAMILIES, save_model

TP, PP, VPP, EP = (
    f"{kind}_model_parallel_size" for kind in ("tensor", "pipeline", "virtual_pipeline", "expert")
)
ETP = "expert_tensor_parallel_size"
LAYOUTS = {
    1: [{}],
    2: [{TP: 2}, {PP: 2}, {PP: 2, VPP: 2}, {}, {EP: 2}, {TP: 2, EP: 2, ETP: 1}],
    4: [{TP: 2, PP: 2}, {TP: 4}, {TP: 2, EP: 2}, {EP: 2, PP: 2}, {TP: 2, EP: 4, ETP: 1}, {EP: 2}],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder and model of every family, with the reference logits beside the folder."""
    root = tmp_path_factory.mktemp("models")
    tokens = torch.arange(20).view(2, 10) * 6 % 131
    models = {}
    for family in FAMILIES:
        folder = root / family
        model = save_model(family, folder, max_shard_size="20KB" if family == "qwen3" else "1GB")
        (folder / "tokenizer.model").write_bytes(b"not read here")
        with torch.no_grad():
            save_file({"tokens": tokens, "logits": model(tokens).logits}, str(folder) + ".logits")
        models[str(folder)] = model
    return models


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_layouts(models, tmp_path, world_size):
    from transformers import AutoModelForCausalLM

    # TP=4 splits two query groups of two heads each within a group.
    folders, layouts = list(models), LAYOUTS[world_size]
    if world_size > 1:  # these have the mappings of other families
        known = ("llama_tied", "mistral", "qwen3_yarn", "glm", "deepseek_v2")
        folders = [f for f in folders if Path(f).name not in known]
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "notes.txt").write_text("not an export")
    differences = run_ranks(
        world_size,
        "tests.support.ranks.weights:check_layouts",
        folders=folders,
        layouts=layouts,
        out=str(tmp_path),
        occupied=str(occupied),
    )
    assert [file.name for file in occupied.iterdir()] == ["notes.txt"]
    cases = [
        (i, folder)
        for i, sizes in enumerate(layouts)
        for folder in folders
        if EP not in sizes or {"moe", "deepseek"} & set(Path(folder).name.split("_"))
    ]
    assert len(differences) == len(cases)
    assert max(differences.values()) < 1e-3, differences
    for index, folder in cases:
        export = tmp_path / str(index) / folder.rsplit("/", 1)[1]
        assert (export / "tokenizer.model").exists()
        assert json.loads((export / "config.json").read_text())["dtype"] == "float32"
        assert len(list(export.glob("model-*.safetensors"))) > 1
        exported = AutoModelForCausalLM.from_pretrained(export).state_dict()
        expected = models[folder].state_dict()
        assert set(exported) == set(expected)
        assert all(torch.equal(exported[name], expected[name]) for name in expected)
        assert not export.with_name(export.name + ".partial").exists()


@pytest.mark.parametrize(
    "sizes",
    [
        {TP: 2},
        {TP: 3},
        *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in ({PP: 2}, {TP: 2, PP: 2})),
    ],
    ids=str,
)
def test_the_stream_takes_less_than_two_layers(tmp_path, sizes):
    """The layers have 2.6 MB, the padded embedding 2.4 MB."""
    shape = {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
    }
    save_model("llama", tmp_path, vocab_size=3071, num_hidden_layers=2, **shape)
    ranks = sizes.get(TP, 1) * sizes.get(PP, 1)
    measured = run_ranks(
        ranks, "tests.support.ranks.weights:stream_peak", folder=str(tmp_path), sizes=sizes
    )
    assert measured["layer"] <= measured["peak"] < 2 * measured["layer"], measured


@pytest.mark.slow
def test_vllm_class_has_the_same_groups(models):
    run_ranks(1, "tests.support.ranks.weights:check_vllm_class", folder=next(iter(models)))
