"""A configuration against the number of ranks, the model and the files that it names."""

import json

import pytest

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


@pytest.mark.parametrize("world, dp", [(8, 1), (16, 2), (24, 3)])
def test_the_data_parallel_size_is_what_remains(tmp_path, monkeypatch, world, dp):
    sizes = ["tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"]
    assert load(tmp_path, monkeypatch, GOOD, [f"megatron.{size}=2" for size in sizes]).validate_for(world) == dp


def test_a_world_size_that_does_not_fit_is_refused_with_the_sizes_that_do(tmp_path, monkeypatch):
    text = GOOD + "megatron:\n  tensor_model_parallel_size: 2\n  pipeline_model_parallel_size: 3\n"
    config = load(tmp_path, monkeypatch, text)
    with pytest.raises(InputError) as caught:
        config.validate_for(8)
    assert str(caught.value) == (
        "run.yaml:7: megatron.pipeline_model_parallel_size: expected a world size that is TP x PP x CP x DP "
        "= 2 x 3 x 1 x "
        "DP, a multiple of 6, got 8; start 6 or 12 ranks (torchrun --nproc-per-node), or lower one of "
        "megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size"
    )
    with pytest.raises(InputError, match="a multiple of 6, got 1; start 6 ranks"):
        config.validate_for(1)


def test_each_rank_needs_a_response(tmp_path, monkeypatch):
    config = load(tmp_path, monkeypatch, GOOD, ["rollout.prompts_per_step=1", "rollout.group_size=4"])
    assert config.validate_for(4) == 4
    with pytest.raises(InputError, match=r"run.yaml:\d+|override 'rollout.prompts_per_step=1'.* >= .* = 5 .*= 4"):
        config.validate_for(5)


def model_refusal(config, **changes):
    with pytest.raises(InputError) as caught:
        config.validate_model({**HF, **changes})
    return str(caught.value)


def test_the_layout_must_divide_the_model(tmp_path, monkeypatch):
    text = GOOD + "megatron:\n  tensor_model_parallel_size: 2\n  pipeline_model_parallel_size: 4\n"
    lines = model_refusal(load(tmp_path, monkeypatch, text)).splitlines()
    assert lines == [
        "run.yaml:6: megatron.tensor_model_parallel_size: expected a divisor of the model's 9 attention heads, got 2",
        "run.yaml:6: megatron.tensor_model_parallel_size: expected a divisor of the model's 3 key-value heads, got 2",
        "run.yaml:7: megatron.pipeline_model_parallel_size: expected a divisor of the model's 30 layers, got 4",
    ]
    text = GOOD + "megatron:\n  pipeline_model_parallel_size: 2\n  virtual_pipeline_model_parallel_size: 4\n"
    assert model_refusal(load(tmp_path, monkeypatch, text)) == (
        "run.yaml:7: megatron.virtual_pipeline_model_parallel_size: expected PP x VPP to divide the model's 30 layers, "
        "got 2 x 4 = 8"
    )


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
    sizes = {"tensor_model_parallel_size": 4, "expert_model_parallel_size": 8, "expert_tensor_parallel_size": 1}

    def configure(**changes):
        keys = sizes | {"sequence_parallel": "true"} | changes
        return load(tmp_path, monkeypatch, GOOD, [f"megatron.{key}={value}" for key, value in keys.items()])

    assert configure().validate_model(MOE) == MOE
    assert configure().validate_for(8) == 2
    local = {key: value for key, value in MOE.items() if key != "num_experts"}
    assert configure().validate_model({**local, "num_local_experts": 128})
    assert "expected integers num_experts in config.json" in model_refusal(configure(), **{**MOE, "num_experts": None})
    assert "a divisor of the model's 128 experts, got 3" in model_refusal(configure(expert_model_parallel_size=3), **MOE)
    assert "a divisor of the 768 columns of an expert, got 5" in model_refusal(
        configure(expert_tensor_parallel_size=5), **MOE
    )
    assert "tensor_model_parallel_size: expected a divisor of the 766 columns of an expert, got 4" in model_refusal(
        configure(expert_tensor_parallel_size="null"), **{**MOE, "moe_intermediate_size": 766}
    )
    assert "sequence_parallel: expected true for a model with experts" in model_refusal(
        configure(sequence_parallel="false"), **MOE
    )
    assert "a divisor of the model's 6145 feed-forward columns" in model_refusal(
        configure(), **{**MOE, "mlp_only_layers": [0]}
    )
    with pytest.raises(InputError) as caught:
        configure(pipeline_model_parallel_size=2).validate_for(24)
    assert (
        "expected expert-TP x EP = 1 x 8 to divide the TP x CP x DP = 4 x 1 x 3 = 12 ranks of a pipeline stage (experts "
        "live on the ranks of the dense layers); start a multiple of 16 ranks"
    ) in str(caught.value)
    with pytest.raises(InputError, match="expert-TP x EP = 4 x 8 to divide"):  # null is TP
        configure(expert_tensor_parallel_size="null").validate_for(8)


def test_a_layout_and_lengths_that_fit_are_accepted(tmp_path, monkeypatch):
    overrides = ["megatron.tensor_model_parallel_size=3", "megatron.pipeline_model_parallel_size=2"]
    overrides += ["megatron.virtual_pipeline_model_parallel_size=5", "rollout.max_model_len=8192"]
    assert load(tmp_path, monkeypatch, GOOD, overrides).validate_model(HF) == HF


def test_lengths_must_fit_the_models_context(tmp_path, monkeypatch):
    config = load(tmp_path, monkeypatch, GOOD + "rollout:\n  max_response_tokens: 8192\n")
    assert model_refusal(config) == (
        "run.yaml:6: rollout.max_response_tokens: expected less than the context of 8192 tokens, which holds "
        "the prompt "
        "too, got 8192"
    )
    config = load(tmp_path, monkeypatch, GOOD)
    assert model_refusal(config, max_position_embeddings=128) == (
        "run.yaml (default): rollout.max_response_tokens: expected less than the context of 128 tokens, "
        "which holds the "
        "prompt too, got 2048"
    )
    config = load(tmp_path, monkeypatch, GOOD + "rollout:\n  max_model_len: 8193\n")
    assert model_refusal(config) == (
        "run.yaml:6: rollout.max_model_len: expected at most the model's context (max_position_embeddings "
        "8192), got 8193"
    )


def test_models_that_are_not_trained_right_are_refused(tmp_path, monkeypatch):
    config = load(tmp_path, monkeypatch, GOOD)
    message = model_refusal(config, architectures=["GPT2LMHeadModel"])
    assert "LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM, MistralForCausalLM, got GPT2LMHeadModel" in message
    assert "expected integers vocab_size in config.json" in model_refusal(config, vocab_size=None)
    assert "expected unquantised weights" in model_refusal(config, quantization_config={"bits": 4})
    assert "at most 4096, the model's attention window" in model_refusal(config, sliding_window=4096)
    config.validate_model({**HF, "sliding_window": 4096, "use_sliding_window": False})
    overrides = ["megatron.expert_model_parallel_size=2", "megatron.expert_tensor_parallel_size=1"]
    config = load(tmp_path, monkeypatch, GOOD, overrides)
    assert "expected 1 for a model without experts" in model_refusal(config)
    assert "expected null for a model without experts" in model_refusal(config)
    config = load(tmp_path, monkeypatch, GOOD, ["rollout.tensor_parallel_size=2"])
    assert "override 'rollout.tensor_parallel_size=2'" in model_refusal(config)


def test_a_model_folder_is_complete_or_refused(tmp_path, monkeypatch):
    config = load(tmp_path, monkeypatch, GOOD)
    folder = tmp_path / "model"

    def told():
        with pytest.raises(InputError) as caught:
            config.validate_model()
        return str(caught.value)

    assert told().startswith('run.yaml:2: model.path: expected a model folder, found nothing at "model"')
    assert "never looked up on a hub" in told() and "hf download" in told()
    folder.mkdir()
    assert [line.split("expected ")[1].split(" ")[0] for line in told().splitlines()] == [
        "config.json",
        "*.safetensors",
        "tokenizer",
    ]
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (folder / "config.json").write_text("[1]")
    assert "found a Git LFS pointer" in told()
    (folder / "model.safetensors").write_bytes(b"\2" + b"\0" * 7 + b"{}")  # no tensors
    assert "expected a JSON object in model/config.json, got a JSON list" in told()
    (folder / "config.json").write_text("{")
    assert "expected a JSON object in model/config.json, got JSONDecodeError (Expecting property name" in told()
    (folder / "config.json").write_text(json.dumps(HF))
    assert config.validate_model() == HF
    (folder / "tokenizer.json").rename(folder / "spm.model")
    assert "expected tokenizer files in" in told()
    load(tmp_path, monkeypatch, GOOD, ["model.tokenizer=model/spm.model"]).validate_model()


def test_a_missing_prompt_file_is_named(tmp_path, monkeypatch):
    config = load(tmp_path, monkeypatch, GOOD, ["data.prompts=questions.jsonl"])
    with pytest.raises(
        InputError, match="override 'data.prompts=questions.jsonl': data.prompts: expected a readable file"
    ):
        config.validate_paths()
    (tmp_path / "questions.jsonl").write_text("{}\n")
    config.validate_paths()


def test_the_head_needs_memory_for_one_token(tmp_path, monkeypatch):
    config = load(tmp_path, monkeypatch, GOOD, ["megatron.head_memory_mib=1"])
    assert "megatron.head_memory_mib: expected at least 2 (one token's logits), got 1" in model_refusal(config, vocab_size=300_000)
    config.validate_model({**HF, "vocab_size": 170_000})
