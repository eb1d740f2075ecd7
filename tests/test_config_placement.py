"""Checks of a configuration against ranks, model and files."""

import errno
import json
import os
from pathlib import Path

import pytest

from megatron_espo.config import checks
from megatron_espo.config.checks import check_paths, check_world_size, read_model
from megatron_espo.errors import InputError
from megatron_espo.models.registry import read_spec
from megatron_espo.models.rope import Rope, read_rope
from tests.support.model_folder import write_tensors, write_weights
from tests.test_config import GOOD, load

HF = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}


def test_the_data_parallel_size_is_derived(tmp_path, monkeypatch):
    overrides = [
        f"megatron.{kind}_parallel_size=2" for kind in ("tensor_model", "pipeline_model", "context")
    ]
    config = load(tmp_path, monkeypatch, GOOD, overrides)
    assert [check_world_size(config, world) for world in (8, 16, 24)] == [1, 2, 3]


def test_a_wrong_world_size_names_the_sizes_that_fit(tmp_path, monkeypatch):
    text = GOOD + "megatron:\n  tensor_model_parallel_size: 2\n  pipeline_model_parallel_size: 3\n"
    config = load(tmp_path, monkeypatch, text)
    with pytest.raises(InputError) as caught:
        check_world_size(config, 8)
    start = "run.yaml:7: megatron.pipeline_model_parallel_size: expected a world size"
    assert str(caught.value).startswith(start)
    assert "a multiple of 6, got 8; " in str(caught.value)
    with pytest.raises(InputError, match="a multiple of 6, got 1"):
        check_world_size(config, 1)


def test_each_rank_needs_a_response(tmp_path, monkeypatch):
    overrides = ["rollout.prompts_per_step=1", "rollout.group_size=4"]
    overrides += ["algorithm.num_mini_batches=1"]
    config = load(tmp_path, monkeypatch, GOOD, overrides)
    assert check_world_size(config, 4) == 4
    with pytest.raises(
        InputError, match="override 'rollout.prompts_per_step=1'.* = 5 responses a step, got 4"
    ):
        check_world_size(config, 5)


def check_model(config, hf_config=None):
    """Check the model at ``model.path``, or one with this ``config.json``; return the latter."""
    if hf_config is None:
        return checks.check_model(config).hf_config
    folder = Path(config.model.path)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config))
    return checks.check_model(config, read_model(config)).hf_config


def model_errors(config, **changes):
    with pytest.raises(InputError) as caught:
        check_model(config, {**HF, **changes})
    return str(caught.value)


MOE = {
    **HF,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_hidden_layers": 48,
    "intermediate_size": 6145,  # of dense layers, which this model does not have
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}


def test_experts_must_fit_the_layout(tmp_path, monkeypatch):
    sizes = {
        "tensor_model_parallel_size": 4,
        "expert_model_parallel_size": 8,
        "expert_tensor_parallel_size": 1,
    }

    def configure(**changes):
        keys = sizes | {"sequence_parallel": "true"} | changes
        return load(
            tmp_path, monkeypatch, GOOD, [f"megatron.{key}={value}" for key, value in keys.items()]
        )

    assert check_model(configure(), MOE) == MOE
    assert check_world_size(configure(), 8) == 2
    local = {key: value for key, value in MOE.items() if key != "num_experts"}
    assert check_model(configure(), {**local, "num_local_experts": 128})
    assert "integers num_experts, found none" in model_errors(
        configure(), **{**MOE, "num_experts": None}
    )
    assert "a divisor of the model's 128 experts, got 3" in model_errors(
        configure(expert_model_parallel_size=3), **MOE
    )
    assert "a divisor of the model's 768 columns per expert, got 5" in model_errors(
        configure(expert_tensor_parallel_size=5), **MOE
    )
    assert (
        "tensor_model_parallel_size: expected a divisor of the model's 766 columns per expert"
        in model_errors(
            configure(expert_tensor_parallel_size="null"), **{**MOE, "moe_intermediate_size": 766}
        )
    )
    assert "sequence_parallel: expected true for a model with experts" in model_errors(
        configure(sequence_parallel="false"), **MOE
    )
    assert "a divisor of the model's 6145 feed-forward columns" in model_errors(
        configure(), **{**MOE, "mlp_only_layers": [0]}
    )
    with pytest.raises(InputError) as caught:
        check_world_size(configure(pipeline_model_parallel_size=2), 24)
    expected = 'expert-TP x EP to divide the 12 ranks of a pipeline stage, got "1 x 8"'
    assert expected in str(caught.value)
    with pytest.raises(InputError, match='got "4 x 8"'):  # null is TP
        check_world_size(configure(expert_tensor_parallel_size="null"), 8)


def test_a_layout_and_lengths_that_fit_are_accepted(tmp_path, monkeypatch):
    overrides = ["megatron.tensor_model_parallel_size=3", "megatron.pipeline_model_parallel_size=2"]
    overrides += ["megatron.virtual_pipeline_model_parallel_size=5", "rollout.max_model_len=8192"]
    assert check_model(load(tmp_path, monkeypatch, GOOD, overrides), HF) == HF


def test_lengths_must_fit_the_models_context(tmp_path, monkeypatch):
    config = load(tmp_path, monkeypatch, GOOD + "rollout:\n  max_response_tokens: 8192\n")
    message = model_errors(config)
    assert message.startswith("run.yaml:6: rollout.max_response_tokens: expected less than")
    config = load(tmp_path, monkeypatch, GOOD)
    message = model_errors(config, max_position_embeddings=128)
    assert message.startswith("run.yaml (default): rollout.max_response_tokens: ")
    assert "128 tokens" in message and "got 2048" in message
    config = load(tmp_path, monkeypatch, GOOD + "rollout:\n  max_model_len: 8193\n")
    message = model_errors(config)
    assert message.startswith("run.yaml:6: rollout.max_model_len: ") and "got 8193" in message


def test_a_window_counts_only_where_the_model_uses_it(tmp_path, monkeypatch):
    config = load(tmp_path, monkeypatch, GOOD)
    window = {"sliding_window": 32}
    check_model(config, HF | window | QWEN3)
    used = window | QWEN3 | {"use_sliding_window": True}
    assert "attention window" in model_errors(config, **used)
    assert "attention window" in model_errors(
        config, **window, architectures=["MistralForCausalLM"], model_type="mistral"
    )


def test_unsupported_models_are_refused(tmp_path, monkeypatch):
    config = load(tmp_path, monkeypatch, GOOD)
    assert "at most 4096, the attention window" in model_errors(config, sliding_window=4096)
    check_model(config, {**HF, "sliding_window": 4096, "use_sliding_window": False})
    overrides = ["megatron.expert_model_parallel_size=2", "megatron.expert_tensor_parallel_size=1"]
    config = load(tmp_path, monkeypatch, GOOD, overrides)
    assert "expected 1 for a model without experts" in model_errors(config)
    assert "expected null for a model without experts" in model_errors(config)
    config = load(tmp_path, monkeypatch, GOOD, ["rollout.tensor_parallel_size=2"])
    assert "override 'rollout.tensor_parallel_size=2'" in model_errors(config)


def test_an_incomplete_model_folder_is_refused(tmp_path, monkeypatch):
    config = load(tmp_path, monkeypatch, GOOD)
    folder = tmp_path / "model"

    def message():
        with pytest.raises(InputError) as caught:
            check_model(config)
        return str(caught.value)

    assert message().startswith(
        'run.yaml:2: model.path: expected a model folder, found nothing at "model"'
    )
    assert "hf download" in message()
    folder.mkdir()
    assert [line.split("expected ")[1].split(" ")[0] for line in message().splitlines()] == [
        "config.json",
        "model.safetensors",
        "tokenizer",
    ]
    (folder / "tokenizer.json").write_text("{}")
    (folder / "config.json").write_text("[1]")
    write_weights(folder, HF)
    assert "model/config.json: expected a JSON object, got a JSON list" in message()
    (folder / "config.json").write_text(json.dumps(HF | {"hidden_act": "gelu"}))
    assert message() == "run.yaml:2: model.path: config.json: hidden_act: expected silu, got 'gelu'"
    (folder / "config.json").write_text(json.dumps(HF))
    assert check_model(config) == HF
    (folder / "tokenizer.json").rename(folder / "spm.model")
    check_model(load(tmp_path, monkeypatch, GOOD, ["model.tokenizer=model/spm.model"]))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6}}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, "rope_parameters"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0}},
            "rope_scaling",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_key_value_heads": 2}, "num_key_value_heads"),
        ({"hidden_size": 577}, "head_dim"),
        ({"head_dim": -1}, "head_dim"),
        ({"num_hidden_layers": -30}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"model_type": "qwen3"}, "model_type"),
        ({"architectures": "LlamaForCausalLM"}, "architecture"),
    ],
)
def test_models_that_megatron_cannot_build(tmp_path, monkeypatch, changes, key):
    message = model_errors(load(tmp_path, monkeypatch, GOOD), **changes)
    assert message.startswith("run.yaml:2: model.path: ") and key in message


def test_both_forms_of_rotary_keys_are_read():
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0}
    llama3 |= {"original_max_position_embeddings": 8192}
    old = {"rope_theta": 5e5, "rope_scaling": llama3 | {"rope_type": "llama3"}}
    new = {"rope_parameters": llama3 | {"rope_type": "llama3", "rope_theta": 5e5}}
    assert read_rope(old) == read_rope(new) == Rope(5e5, 8.0)
    assert read_rope({"rope_theta": 1e6, "rope_scaling": None}) == Rope(1e6, None)
    assert read_rope({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}).theta == 1e6
    assert read_rope({}).theta == 1e4


SMALL = HF | {
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "hidden_size": 8,
    "intermediate_size": 16, "vocab_size": 32,
}  # fmt: skip
SHAPES = read_spec(SMALL).tensor_shapes
NORM, HEAD = "model.norm.weight", "lm_head.weight"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = dict.fromkeys(SHAPES, FIRST) | {NORM: SECOND}
IN_FIRST = {name: shape for name, shape in SHAPES.items() if name != NORM}


def folder_message(tmp_path, monkeypatch, files, index=None, hf_config=SMALL, dtype="BF16"):
    """What ``check_model`` says about a folder with these weight files; empty: nothing."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps(hf_config))
    for name, tensors in files.items():
        if isinstance(tensors, dict):
            write_tensors(folder / name, tensors, dtype)
        else:
            (folder / name).write_bytes(tensors)
    if index:
        text = json.dumps({"weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text)
    try:
        check_model(load(tmp_path, monkeypatch, GOOD))
    except InputError as error:
        return str(error)
    return ""


ONE = "model.safetensors"


@pytest.mark.parametrize(
    ("files", "index", "named"),
    [
        ({ONE: SHAPES}, None, ""),
        ({ONE: SHAPES, "consolidated.safetensors": b"other", "pytorch_model.bin": b"x"}, None, ""),
        ({FIRST: IN_FIRST, SECOND: {NORM: (8,)}}, INDEX, ""),
        # The index decides which copy of a tensor counts.
        ({FIRST: IN_FIRST | {NORM: (3,)}, SECOND: {NORM: (8,)}}, INDEX, ""),
        ({ONE: SHAPES, "original.safetensors": SHAPES}, dict.fromkeys(SHAPES, ONE), ""),
        ({"consolidated.safetensors": SHAPES}, None, "consolidated.safetensors"),
        ({FIRST: IN_FIRST, SECOND: {}}, INDEX, f"{SECOND}: expected tensor {NORM}"),
        ({ONE: SHAPES | {HEAD: (33, 8)}}, None, f"{ONE}: {HEAD}: expected shape (32, 8)"),
        ({ONE: b""}, None, ONE),
        ({ONE: b"<html>Not found</html>"}, None, ONE),
    ],
)
def test_weights_are_checked_before_torch(tmp_path, monkeypatch, files, index, named):
    message = folder_message(tmp_path, monkeypatch, files, index)
    assert named in message and bool(message) == bool(named)


def test_integer_weights_are_refused(tmp_path, monkeypatch):
    message = folder_message(tmp_path, monkeypatch, {ONE: SHAPES}, dtype="F8_E4M3")
    assert f"{ONE}: model.embed_tokens.weight" in message and "got F8_E4M3" in message


@pytest.mark.parametrize("position", [None, 0, 100])
def test_a_tied_head_with_other_values_is_refused(tmp_path, monkeypatch, position):
    tied = SMALL | {"tie_word_embeddings": True}
    write_tensors(tmp_path / "weights", SHAPES)
    content = bytearray((tmp_path / "weights").read_bytes())
    if position is not None:
        content[-32 * 8 * 2 + position] = 1  # the head is the last tensor
    message = folder_message(tmp_path, monkeypatch, {ONE: bytes(content)}, hf_config=tied)
    assert ("lm_head.weight differs" in message) == (position is not None)


def test_weights_behind_symbolic_links(tmp_path, monkeypatch):
    """As in the cache of the Hugging Face hub."""
    write_tensors(tmp_path / "blob", SHAPES)
    (tmp_path / "model").mkdir()
    for name, target in ((ONE, "blob"), ("tokenizer.json", "config"), ("config.json", "config")):
        (tmp_path / "model" / name).symlink_to(f"../{target}")
    (tmp_path / "config").write_text(json.dumps(SMALL))
    config = load(tmp_path, monkeypatch, GOOD)
    assert check_model(config) == SMALL
    (tmp_path / "blob").unlink()
    with pytest.raises(InputError, match="model/model.safetensors"):
        check_model(config)


@pytest.mark.parametrize("folder", ["runs/with blank", "runs/größe", "absent/a/b"])
def test_a_run_folder_may_have_any_name(tmp_path, monkeypatch, folder):
    (tmp_path / "p.jsonl").write_text("{}\n")
    overrides = ["data.prompts=p.jsonl", f"run.dir={folder}"]
    check_paths(load(tmp_path, monkeypatch, GOOD, overrides))
    assert (tmp_path / folder).is_dir()


def test_a_full_disk_is_noticed_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "p.jsonl").write_text("{}\n")
    config = load(tmp_path, monkeypatch, GOOD, ["data.prompts=p.jsonl", "run.dir=out"])

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="run.dir: .*No space left on device"):
        check_paths(config)


def test_a_plan_says_what_to_download(tmp_path, monkeypatch):
    config = load(tmp_path, monkeypatch, GOOD)
    with pytest.raises(InputError, match="hf download .* config.json --local-dir model"):
        read_model(config)


def test_the_head_needs_memory_for_one_token(tmp_path, monkeypatch):
    config = load(tmp_path, monkeypatch, GOOD, ["megatron.head_memory_mib=1"])
    assert (
        "megatron.head_memory_mib: expected at least 2 (one token's logits), got 1"
        in model_errors(config, vocab_size=300_000)
    )
    check_model(config, {**HF, "vocab_size": 170_000})
