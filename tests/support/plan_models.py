"""``config.json`` of well-known models, and the plan of a run in its own process."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

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
# About 50 million parameters: tests train it.
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


def sizes(**kinds: int | None) -> dict[str, int | None]:
    """``tensor_model=2`` -> ``{"tensor_model_parallel_size": 2}``."""
    return {f"{kind}_parallel_size": size for kind, size in kinds.items()}


def settings(folder: Path, hf_config: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose model folder ``folder`` has only ``config.json``."""
    folder.joinpath("config.json").write_text(json.dumps(hf_config))
    given = {"model": {"path": str(folder)}, "data": {"prompts": "prompts.jsonl"}}
    return given | {name: given.get(name, {}) | keys for name, keys in sections.items()}


def plan_command(
    folder: Path, hf_config: dict[str, Any], *options: str, **sections: Any
) -> tuple[int, str, dict[str, Any] | None]:
    """Run ``megatron-espo plan``: exit code, output, content of the JSON file."""
    file, out = folder / "run.yaml", folder / "plan.json"
    out.unlink(missing_ok=True)
    file.write_text(json.dumps(settings(folder, hf_config, **sections)))  # JSON is YAML
    process = _command_process()
    assert process.stdin and process.stdout
    print(json.dumps(["plan", str(file), "--json", str(out), *options]), file=process.stdin)
    process.stdin.flush()
    code, text = json.loads(process.stdout.readline())
    return code, text, json.loads(out.read_text()) if out.exists() else None


COMMANDS = """
import contextlib, io, json, sys
from megatron_espo.cli import main
for line in sys.stdin:
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = main(json.loads(line))
    print(json.dumps([code, out.getvalue() + error.getvalue()]), flush=True)
"""


@cache
def _command_process() -> subprocess.Popen:
    """One process for all commands: a plan patches torch, and importing Megatron takes seconds."""
    command, pipe = [sys.executable, "-c", COMMANDS], subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)


CPU_PLAN = """
import dataclasses, json, sys
from megatron_espo.config import Config
from megatron_espo.models.registry import read_spec
from megatron_espo.tools.plan.planner import Builder, Machine, make_plan
settings, hf_config, expected_tokens = json.loads(sys.argv[1])
machine = Machine(10**12, 1e9, 1e9, 8, 50e9, expected_tokens)
plan = make_plan(Config.model_validate(settings), Builder(read_spec(hf_config)), machine, gpus=1)
print(json.dumps(dataclasses.asdict(plan)))
"""


def plan_on_cpu(
    folder: Path, hf_config: dict[str, Any], expected_tokens: int, **sections: Any
) -> dict[str, Any]:
    """The plan of a run on one rank without a GPU."""
    arguments = json.dumps([settings(folder, hf_config, **sections), hf_config, expected_tokens])
    command = [sys.executable, "-c", CPU_PLAN, arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=360)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
