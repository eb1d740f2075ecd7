"""Writes a tiny chat model with a tokenizer, for a whole run in seconds."""

import json
from pathlib import Path

import yaml

WORDS = "<pad> <s> </s> <unk> 0 1 2 3 4 5 6 7 8 9 + - = ? . What is the answer number only".split()


def save_tiny_model(folder: str | Path, family: str = "llama", seed: int = 7, **changes) -> Path:
    """Write a random two-layer model of ``family`` (TP=2 divides it) and a word tokenizer; return
    the folder.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from tests.support.weights_models import expert_biases

    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    sizes = {
        "vocab_size": len(WORDS),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,  # the smallest that vLLM serves on a CPU
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **(sizes | changes)), dtype=torch.float32
    )
    with (
        torch.no_grad()
    ):  # large weights, because small ones give a uniform policy without entropy groups
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter.dim() == 1))
        for bias in expert_biases(model).values():
            bias.copy_(torch.randn_like(bias) * 0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def write_tiny_run(folder: Path, **sections: dict) -> None:
    """Write ``run.yaml`` for the model in ``folder / "model"``, and nine prompts.

    ``sections`` add settings.
    """
    rows = [{"prompt": f"What is {i}?", "answer": str(i)} for i in range(9)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "run": {"dir": "(given)"},
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "optimizer": {"lr": 0.003},
        "algorithm": {"num_mini_batches": 1},
        "rollout": {
            "prompts_per_step": 4,
            "group_size": 2,
            "max_response_tokens": 6,
            "timeout_s": 120,
        },
        "data": {"prompts": str(folder / "prompts.jsonl")},
        "reward": {"function": "tests.test_end_to_end:shortness"},
    }
    for name, settings in sections.items():
        config[name] = config.get(name, {}) | settings
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
