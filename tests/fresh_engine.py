"""Entry of a process with an engine that loads a Hugging Face folder as vLLM itself does: the reference for synced ones."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_espo.rollout.config import EngineConfig
from megatron_espo.rollout.process import child_environment
from tests.distributed import ROOT


def ask_fresh_engine(config: EngineConfig, prompts, answer: Path) -> dict:
    """Samples (token ids, log-probs, finish reason) for the prompts and the checksums of what the engine serves."""
    settings = asdict(config) | {"eos_ids": sorted(config.eos_ids)}
    command = [sys.executable, "-m", "tests.fresh_engine", json.dumps(settings), json.dumps(prompts), str(answer)]
    done = subprocess.run(command, cwd=ROOT, env=child_environment(config), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(answer.read_text())


def main() -> None:
    import vllm

    settings, prompts, answer = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
    build = vllm.LLM
    vllm.LLM = lambda **options: build(**options | {"load_format": "auto"})
    from megatron_espo.rollout.requests import Request
    from megatron_espo.rollout.server import Server

    config = EngineConfig(**settings | {"eos_ids": frozenset(settings["eos_ids"])})
    server = Server(config, lambda done, total: None)
    samples = server.generate([Request(tuple(prompt), None, config.max_response_tokens) for prompt in prompts], {})
    Path(answer).write_text(json.dumps({"samples": samples, "served": server.served_checksums("float32")}))


if __name__ == "__main__":
    main()
