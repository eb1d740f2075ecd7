"""Shapes of well-known models, as their ``config.json`` gives them, and the plan of a run in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

LLAMA_3_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
QWEN2_5_72B = LLAMA_3_70B | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "intermediate_size": 29568,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
}
QWEN3_235B_A22B = LLAMA_3_70B | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": 94,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
}
# About 50 million parameters: small enough to train here.
LLAMA_50M = LLAMA_3_70B | {
    "num_hidden_layers": 8,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 16384,
    "max_position_embeddings": 4096,
}
QWEN3_SMALL = LLAMA_50M | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": 4,
    "tie_word_embeddings": True,
}


def settings(folder: Path, hf_config: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """A configuration for a model of which there is only ``config.json``, in ``folder``."""
    folder.joinpath("config.json").write_text(json.dumps(hf_config))
    given = {"model": {"path": str(folder)}, "data": {"prompts": "prompts.jsonl"}}
    return given | {name: given.get(name, {}) | keys for name, keys in sections.items()}


def plan_command(folder: Path, hf_config: dict[str, Any], *options: str, **sections: Any) -> tuple[int, str, dict[str, Any] | None]:
    """Run ``megatron-espo plan``: exit code, what it printed, the JSON file's content."""
    file, out = folder / "run.yaml", folder / "plan.json"
    out.unlink(missing_ok=True)
    file.write_text(json.dumps(settings(folder, hf_config, **sections)))  # JSON is YAML
    command = [sys.executable, "-m", "megatron_espo", "plan", str(file), "--json", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr, json.loads(out.read_text()) if out.exists() else None


CPU_PLAN = """
import json, sys
from megatron_espo.config import Config
from megatron_espo.plan.make import Builder, Links, Machine, make_plan
settings, hf_config, expected_tokens = json.loads(sys.argv[1])
machine = Machine(10**12, Links(1e9, 1e9, 8), expected_tokens, on_gpu=False)
print(json.dumps(make_plan(Config.model_validate(settings), Builder(hf_config, machine), gpus=1).to_json()))
"""


def plan_on_cpu(folder: Path, hf_config: dict[str, Any], expected_tokens: int, **sections: Any) -> dict[str, Any]:
    """The plan of a run on one rank without a GPU."""
    arguments = json.dumps([settings(folder, hf_config, **sections), hf_config, expected_tokens])
    command = [sys.executable, "-c", CPU_PLAN, arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
