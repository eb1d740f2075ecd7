"""Entry of a process with an engine that tells which experts it chose, under conditions in which tokens are computed in pieces, not at all or twice.

    python -m tests.routed_engine <model folder> <tensor-parallel size> <file>

writes, as JSON, how often these were met, and how many of the choices are not those of transformers' routers for the same tokens.
"""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch

from megatron_espo.config.experts import read_experts
from megatron_espo.rollout.config import EngineConfig
from megatron_espo.rollout.process import child_environment
from tests.distributed import ROOT

RESPONSES, PROMPT_TOKENS, RESPONSE_TOKENS = 90, 60, 12
# A block of the cache holds 32 tokens: not all responses fit, which take three each but for what prompts share.
BLOCKS = 160


def ask(model: Path, tensor_parallel_size: int, answer: Path) -> dict:
    """What such a process writes."""
    command = [sys.executable, "-m", "tests.routed_engine", str(model), str(tensor_parallel_size), str(answer)]
    environment = child_environment(_config(model, tensor_parallel_size)) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(answer.read_text())


def _config(model: Path, tensor_parallel_size: int) -> EngineConfig:
    hf = json.loads((model / "config.json").read_text())
    token_bytes = 2 * hf["num_hidden_layers"] * hf["num_key_value_heads"] * hf["head_dim"] * 4 // tensor_parallel_size
    return EngineConfig(
        model=str(model), log_path="", dtype="float32", transport="", max_response_tokens=RESPONSE_TOKENS, eos_ids=frozenset({2}),
        tensor_parallel_size=tensor_parallel_size, cpu_kv_cache_gib=BLOCKS * 32 * token_bytes / 2**30, load_weights=True, routed_experts=True,
    )  # fmt: skip


def _watch(scheduler) -> Counter:
    """Counts what befalls requests."""
    met: Counter = Counter()
    schedule, preempt = scheduler.schedule, scheduler._preempt_request

    def watched_schedule(*args, **kwargs):
        output = schedule(*args, **kwargs)
        for request in output.scheduled_new_reqs:
            met["cached"] += request.num_computed_tokens > 0
            met["in pieces"] += request.num_computed_tokens + output.num_scheduled_tokens[request.req_id] < len(request.prompt_token_ids)
        return output

    def watched_preempt(*args, **kwargs):
        met["preempted"] += 1
        return preempt(*args, **kwargs)

    scheduler.schedule, scheduler._preempt_request = watched_schedule, watched_preempt
    return met


def _make_prompts(draw: random.Random, vocabulary: int) -> list[tuple[int, ...]]:
    """Every ninth begins like the first."""
    prompts = [tuple(draw.randrange(4, vocabulary) for _ in range(PROMPT_TOKENS)) for _ in range(RESPONSES)]
    prompts[1::9] = [prompts[0][:40] + prompt[40:] for prompt in prompts[1::9]]
    return prompts


def main() -> None:
    from transformers import AutoModelForCausalLM

    from megatron_espo.rollout.requests import Enough, Request
    from megatron_espo.rollout.server import Server

    folder, size = Path(sys.argv[1]), int(sys.argv[2])
    server = Server(_config(folder, size), lambda *news: None)
    scheduler = server.llm.llm_engine.engine_core.engine_core.scheduler
    met, draw = _watch(scheduler), random.Random(4)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    first, second, third = (_make_prompts(draw, vocabulary) for _ in range(3))
    samples = server.generate([Request(prompt, seed, RESPONSE_TOKENS) for seed, prompt in enumerate(first)], {})
    canary = server.canary(first[:4], 4)
    judged = server.generate([Request(prompt, 1, 4) for prompt in first[:4]], {"temperature": 0.5})
    # Some are left unfinished: with their experts, or without where they had been preempted or had not begun.
    parts = server.generate([Request(prompt, seed, RESPONSE_TOKENS, seed) for seed, prompt in enumerate(second)], {}, enough=Enough(4))
    # On CPUs the product does not let vLLM cut a prompt.
    scheduler.scheduler_config.enable_chunked_prefill, scheduler.max_num_scheduled_tokens = True, 500
    pieces = server.generate([Request(prompt, None, RESPONSE_TOKENS) for prompt in third], {})
    met["unfinished, known"] = sum(sample[2] == "unfinished" and sample[3] is not None for sample in parts)
    met["unfinished, preempted"] = sum(sample[3] is None and len(sample[0]) > 0 for sample in parts)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    top_k, wrong, compared = read_experts(model.config.to_dict()).per_token, 0, 0
    for prompt, (response, _, reason, chosen) in zip([*first, *first[:4], *second, *third], [*samples, *canary, *parts, *pieces], strict=True):
        if chosen is None and reason == "unfinished":
            continue
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response]]), output_router_logits=True).router_logits
        own = torch.stack(logits, 1)[:-1].topk(top_k).indices.sort(-1).values
        found = torch.from_numpy(chosen.astype("int64")).sort(-1).values
        assert found.shape == own.shape, (found.shape, own.shape)
        wrong += int((found != own).any(-1).sum())
        compared += found[..., 0].numel()
    told = met | {"wrong": wrong, "compared": compared, "dtype": str(samples[0][3].dtype), "judged": [sample[3] for sample in judged]}
    Path(sys.argv[3]).write_text(json.dumps(told))
    os._exit(0)  # as the engine's process does


if __name__ == "__main__":
    main()
