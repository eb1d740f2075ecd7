"""Engines in tests: their settings, requests to them, and transformers' log-probs."""

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_espo.rollout.engine import Generation, Sampling
from megatron_espo.rollout.http_client import HttpClient, LoopThread
from megatron_espo.rollout.pool import request_seed
from megatron_espo.rollout.server import EngineConfig, run_key
from megatron_espo.rollout.vllm_engine import VLLMEngine

EOS, TEMPERATURE = 2, 0.7


def engine_config(model: str | Path, folder: str | Path, **changes: Any) -> EngineConfig:
    """Settings of a small float32 engine; ``changes`` replace some."""
    options: dict[str, Any] = {
        "dtype": "float32",
        "transport": "files",
        "temperature": TEMPERATURE,
        "timeout_s": 300.0,
        "engine_args": {"kv_cache_memory_bytes": 1 << 27},
    }
    return EngineConfig(**options | {"model": str(model), "folder": str(folder)} | changes)


@contextmanager
def running_engine(
    config: EngineConfig, engine_type: type[VLLMEngine] = VLLMEngine
) -> Iterator[VLLMEngine]:
    """A server with a loaded model; it ends with the block."""
    loop = LoopThread()
    engine = engine_type(config, loop)
    try:
        engine.start()
        engine.wait_ready()
        yield engine
    finally:
        engine.close()
        loop.close()


async def request_tokens(
    engine: VLLMEngine,
    prompts: Sequence[Sequence[int]],
    samples: int = 1,
    *,
    seed: int = 0,
    **changes: Any,
) -> list[list[Generation]]:
    """``samples`` responses to each prompt, requested at the same time.

    Args:
        seed: the seed of a response depends on it, on the prompt and on the response's number.
        changes: fields of ``Sampling``.
    """
    client = HttpClient(engine.address, run_key(engine.config.folder))
    options = {"max_tokens": 12, "temperature": TEMPERATURE, "stop_token_ids": (EOS,)} | changes

    def request(ids: Sequence[int], number: int) -> Any:
        own = request_seed(seed, tuple(ids), number)
        return client.generate(f"{own}", ids, Sampling(seed=own, **options))

    try:
        requests = (request(ids, number) for ids in prompts for number in range(samples))
        found = await asyncio.gather(*requests)
    finally:
        await client.close()
    return [found[i * samples : (i + 1) * samples] for i in range(len(prompts))]


def sample(
    engine: VLLMEngine, prompts: Sequence[Sequence[int]], samples: int = 1, **options: Any
) -> list[list[Generation]]:
    """:func:`request_tokens` from a thread without an event loop."""
    return asyncio.run(request_tokens(engine, prompts, samples, **options))


@torch.no_grad()
def reference_logprobs(
    model: Any,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    temperature: float = TEMPERATURE,
) -> torch.Tensor:
    """log softmax(logits / temperature) of each response token, float64, from transformers."""
    ids = torch.tensor([[*prompt_ids, *response_ids]])
    logprobs = (model(ids).logits[0].double() / temperature).log_softmax(-1)[len(prompt_ids) - 1 :]
    return logprobs[:-1].gather(-1, torch.tensor(response_ids)[:, None].long())[:, 0]


def assert_serves(
    engine: VLLMEngine, model: Any, prompts: Sequence[Sequence[int]], atol: float = 1e-4
) -> None:
    """The engine's log-probs are those of ``model``."""
    for ids, group in zip(prompts, sample(engine, prompts, 2, seed=1), strict=True):
        for found in group:
            expected = reference_logprobs(model, ids, found.token_ids.tolist())
            logprobs = torch.from_numpy(found.logprobs).double()
            torch.testing.assert_close(logprobs, expected, atol=atol, rtol=0)


def fresh_engine(
    model: str | Path, folder: Path, prompts: Sequence[Sequence[int]], **options: Any
) -> tuple[list[Generation], dict[str, int]]:
    """Responses and checksums of an engine that reads a Hugging Face folder's weights itself."""
    config = engine_config(model, folder, log_name="fresh.log", load_weights=True)
    with running_engine(config) as engine:
        found = [group[0] for group in sample(engine, prompts, **options)]
        (sums,) = engine._worker("read_back_checksums", "float32")
        return found, sums


def living_in_group(group: int) -> list[int]:
    """Running processes of a process group; processes that wait to be reaped do not count."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(process.name)) == group and is_running(int(process.name)):
                found.append(int(process.name))
        except OSError:
            pass
    return sorted(found)


def is_running(pid: int) -> bool:
    """Whether a process exists and does not wait to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> None:
    """Wait for ``condition``; fail with ``what`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)
