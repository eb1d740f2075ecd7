"""Checks of a configuration against ranks, model and files."""

import json

import pytest

from megatron_espo.config.checks import check_model, check_paths, check_world_size
from megatron_espo.errors import InputError
from tests.test_config import GOOD, load

HF = {
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
}


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
    assert "a multiple of 6, got 8; start 6 or 12 ranks" in str(caught.value)
    with pytest.raises(InputError, match="a multiple of 6, got 1; start 6 ranks"):
        check_world_size(config, 1)


def test_each_rank_needs_a_response(tmp_path, monkeypatch):
    overrides = ["rollout.prompts_per_step=1", "rollout.group_size=4"]
    config = load(tmp_path, monkeypatch, GOOD, overrides)
    assert check_world_size(config, 4) == 4
    with pytest.raises(InputError, match="override 'rollout.prompts_per_step=1'.* = 5, got 1 x 4"):
        check_world_size(config, 5)


def model_errors(config, **changes):
    with pytest.raises(InputError) as caught:
        check_model(config, {**HF, **changes})
    return str(caught.value)


def test_the_layout_must_divide_the_model(tmp_path, monkeypatch):
    text = GOOD + "megatron:\n  tensor_model_parallel_size: 2\n  pipeline_model_parallel_size: 4\n"
    found = model_errors(load(tmp_path, monkeypatch, text)).splitlines()
    start = "run.yaml:6: megatron.tensor_model_parallel_size: expected a divisor of the model's"
    assert found == [
        f"{start} 9 attention heads, got 2",
        f"{start} 3 key-value heads, got 2",
        f"{start.replace('6: megatron.tensor', '7: megatron.pipeline')} 30 layers, got 4",
    ]
    overrides = ["pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size=4"]
    overrides = [f"megatron.{override}" for override in overrides]
    message = model_errors(load(tmp_path, monkeypatch, GOOD, overrides))
    assert "megatron.virtual_pipeline_model_parallel_size: " in message
    assert "30 layers, got 2 x 4 = 8" in message


MOE = {
    **HF,
    "architectures": ["Qwen3MoeForCausalLM"],
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
    assert "expected integers num_experts in config.json" in model_errors(
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
    assert (
        "expected expert-TP x EP = 1 x 8 to divide the TP x CP x DP = 4 x 1 x 3 = 12 ranks of a "
        "pipeline stage; start a multiple of 16 ranks"
    ) in str(caught.value)
    with pytest.raises(InputError, match="expert-TP x EP = 4 x 8 to divide"):  # null is TP
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
    check_model(config, HF | window | {"architectures": ["Qwen3ForCausalLM"]})
    used = window | {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True}
    assert "attention window" in model_errors(config, **used)
    assert "attention window" in model_errors(
        config, **window, architectures=["MistralForCausalLM"]
    )


def test_unsupported_models_are_refused(tmp_path, monkeypatch):
    config = load(tmp_path, monkeypatch, GOOD)
    message = model_errors(config, architectures=["GPT2LMHeadModel"])
    assert "Qwen3MoeForCausalLM" in message and "got GPT2LMHeadModel" in message
    assert "expected integers vocab_size in config.json" in model_errors(config, vocab_size=None)
    assert "expected unquantised weights" in model_errors(config, quantization_config={"bits": 4})
    assert "at most 4096, the model's attention window" in model_errors(config, sliding_window=4096)
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
        "*.safetensors",
        "tokenizer",
    ]
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (folder / "config.json").write_text("[1]")
    assert "found a Git LFS pointer" in message()
    (folder / "model.safetensors").write_bytes(b"\2" + b"\0" * 7 + b"{}")  # no tensors
    assert "expected a JSON object in model/config.json, got a JSON list" in message()
    (folder / "config.json").write_text("{")
    assert (
        "expected a JSON object in model/config.json, got JSONDecodeError (Expecting property name"
        in message()
    )
    (folder / "config.json").write_text(json.dumps(HF))
    assert check_model(config) == HF
    (folder / "tokenizer.json").rename(folder / "spm.model")
    assert "expected tokenizer files in" in message()
    check_model(load(tmp_path, monkeypatch, GOOD, ["model.tokenizer=model/spm.model"]))


def test_a_missing_prompt_file_is_named(tmp_path, monkeypatch):
    config = load(tmp_path, monkeypatch, GOOD, ["data.prompts=questions.jsonl"])
    with pytest.raises(
        InputError,
        match="override 'data.prompts=questions.jsonl': data.prompts: expected a readable file",
    ):
        check_paths(config)
    (tmp_path / "questions.jsonl").write_text("{}\n")
    check_paths(config)


def test_the_head_needs_memory_for_one_token(tmp_path, monkeypatch):
    config = load(tmp_path, monkeypatch, GOOD, ["megatron.head_memory_mib=1"])
    assert (
        "megatron.head_memory_mib: expected at least 2 (one token's logits), got 1"
        in model_errors(config, vocab_size=300_000)
    )
    check_model(config, {**HF, "vocab_size": 170_000})
