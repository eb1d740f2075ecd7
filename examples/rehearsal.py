"""Settings of `run_espo_70b.sh --rehearse`: the 70B run with a tiny Llama on four CPU ranks.

Only sizes, folders and the reward differ from the run's YAML file. The rehearsal uses the same
tensor, sequence, pipeline and interleaved parallelism, recomputation and distributed optimizer.
"""

import json
import os
import tempfile
import time
from pathlib import Path

from megatron_espo.config import load_config

RUN_DIR = "runs/rehearsal/run"
SMALLER = [
    "run.steps=3",
    f"run.dir={RUN_DIR}",
    "model.dtype=float32",
    "megatron.tensor_model_parallel_size=2",
    "megatron.pipeline_model_parallel_size=2",
    "megatron.virtual_pipeline_model_parallel_size=2",
    "megatron.max_tokens_per_micro_batch=96",
    "optimizer.lr=3e-4",
    "rollout.prompts_per_step=8",
    "rollout.group_size=4",
    "rollout.max_response_tokens=8",
    "rollout.max_model_len=64",
    "rollout.engines=1",
    "rollout.tensor_parallel_size=1",
    "rollout.engine_args={kv_cache_memory_bytes: 268435456}",
    "rollout.timeout_s=300",
    "rollout.quantization=null",
    "reward.terms={}",
    "reward.function=examples.rehearsal:starts_with_even_digit",
    "reward.workers=1",
]
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"0123456789", "+", "?", ".", "What", "is"]
# Llama-3-70B: hidden 8192, 64 heads of 128, 8 key-value heads, FFN 3.5 x hidden, 80 layers.
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 4,  # one for each of PP 2 x VPP 2
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest that vLLM serves on a CPU
    "max_position_embeddings": 128,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
# With expert parallelism. Qwen3-30B-A3B: 8 of 128 experts a token, FFN 3/8 x hidden.
EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 192,
    "norm_topk_prob": True,
}


def starts_with_even_digit(prompt, response: str) -> float:
    """Return 1 for an even first digit. A random model writes one sometimes: a gradient exists."""
    return float(response.strip()[:1] in tuple("02468"))


def prepare(config: str, folder: str = "runs/rehearsal/start", timeout_s: float = 300) -> list[str]:
    """Return the overrides of the rehearsal, and write its model, tokenizer and prompts.

    Rank 0 writes the files once. The other ranks wait for them.

    Args:
        config: YAML file of the run.
        folder: for the files, on a file system that all nodes share.
    """
    settings = load_config(config)
    experts = settings.megatron.expert_model_parallel_size > 1
    target = Path(f"{folder}_moe" if experts else folder)
    if os.environ.get("RANK", "0") == "0":
        _rename_finished(Path(RUN_DIR))
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            _write(aside, experts)
            aside.rename(target)  # complete or absent
    deadline = time.monotonic() + timeout_s
    while not target.exists():
        if time.monotonic() > deadline:
            advice = f"missing after {timeout_s:g} s; put it on a file system that all nodes share"
            raise TimeoutError(f"{target.absolute()}: {advice}")
        time.sleep(0.2)
    layout = ["megatron.expert_model_parallel_size=2"] if experts else []
    prompts = target / "prompts.jsonl"
    sources = [f"data.prompts={prompts}", "data.task_args={}"]
    if settings.data.mixture:
        sources = [
            f"data.mixture.{name}={{prompts: {prompts}, weight: {source.weight}, "
            f"pass_rate: {list(source.pass_rate)}}}"
            for name, source in settings.data.mixture.items()
        ]
    return [*SMALLER, *layout, f"model.path={target}", *sources]


def _rename_finished(run: Path) -> None:
    """Rename a finished rehearsal after its time. Otherwise this one would resume after its end."""
    status = run / "status.json"
    if status.exists() and json.loads(status.read_text())["state"] == "done":
        ended = time.strftime("%Y%m%d-%H%M%S", time.localtime(status.stat().st_mtime))
        run.rename(run.with_name(f"run-{ended}"))


def _write(folder: Path, experts: bool) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    digits = pre_tokenizers.Digits(individual_digits=True)
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), digits])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    torch.manual_seed(1)
    shape = SHAPE | (EXPERTS if experts else {}) | {"vocab_size": len(WORDS)}
    shape |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model("qwen3_moe" if experts else "llama", **shape)
    model = AutoModelForCausalLM.from_config(config)
    # With the usual 0.02, all tokens have the same entropy. ESPO needs groups of different entropy.
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    model.save_pretrained(folder)
    rows = [
        {"prompt": f"What is {i} + {i}?", "answer": str(2 * i), "pass_rate": i / 31}
        for i in range(32)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
