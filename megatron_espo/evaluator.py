"""Held-out prompts through an engine and the reward workers: every so many steps of a run, or for a model in a folder."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_espo.config import Config, Data
from megatron_espo.data.prompts import PromptStream
from megatron_espo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_espo.evaluation import Evaluation, render_table
from megatron_espo.progress import OnProgress, Phases
from megatron_espo.rewards import RewardPool
from megatron_espo.rollout import Engine, EngineConfig, Fleet, engine_devices, resolve_transport

Polling = Callable[[OnProgress], OnProgress]
# Held-out entries of a reasoning-gym task without a seed of its own must not be the training run's.
_SEED_OFFSET = 1_000_003


def engine_config(
    config: Config, tokenizer: Tokenizer, max_model_len: int, *, routed_experts: bool = False, load_weights: bool = False
) -> EngineConfig:
    """What this rank's rollout engine is started with; with ``load_weights`` it is a child in any case."""
    rollout, rank = config.rollout, int(os.environ.get("RANK", "0"))
    hosts = () if load_weights else rollout.hosts
    own = rank * rollout.engines // int(os.environ.get("WORLD_SIZE", "1"))  # each owner begins with another host
    return EngineConfig(
        # A host's agent may have been started in another folder.
        model=os.path.abspath(config.model.path) if hosts else config.model.path,
        log_path=str(Path(config.run.dir, f"engine-rank{rank}.log" if rank else "engine.log")),
        dtype=config.model.dtype if rollout.dtype == "auto" else rollout.dtype,
        transport="" if load_weights else resolve_transport(rollout.transport, rollout.visible_devices, bool(hosts)),
        max_response_tokens=rollout.max_response_tokens,
        eos_ids=tokenizer.eos_ids,
        max_model_len=max_model_len,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        seed=config.run.seed,
        tensor_parallel_size=rollout.tensor_parallel_size,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        cpu_kv_cache_gib=rollout.cpu_kv_cache_gib,
        timeout_s=rollout.timeout_s,
        start_timeout_s=rollout.timeout_s,
        visible_devices=None if hosts else engine_devices(rollout.visible_devices, rollout.engines, rollout.tensor_parallel_size, os.environ),
        hosts=hosts[own:] + hosts[:own],
        host_timeout_s=rollout.host_timeout_s,
        sleep=rollout.sleep and not load_weights,
        routed_experts=routed_experts,
        load_weights=load_weights,
    )


class Evaluator:
    """The prompts of ``eval.prompts`` (of ``data.prompts`` where there are none), read and checked.

    Args:
        config: the run's configuration.
        tokenizer: the trainer's.
        max_model_len: the engine's context.

    Raises:
        InputError: bad rows.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, max_model_len: int) -> None:
        settings, rollout = config.eval, config.rollout
        source = {"prompts": settings.prompts, "task_args": settings.task_args}
        if settings.prompts is None:
            source = {"prompts": config.data.prompts, "task_args": config.data.task_args}
        longest = settings.max_response_tokens or rollout.max_response_tokens
        stream = PromptStream(
            Data(**source, system_prompt=config.data.system_prompt, shuffle=False),
            tokenizer,
            config.run.seed + _SEED_OFFSET,
            max_response_tokens=longest,
            max_model_len=max_model_len,
        )
        self.prompts = stream.take(min(len(stream), settings.max_prompts or len(stream)))
        self._settings, self._seed = settings, config.run.seed
        temperature = rollout.temperature if settings.temperature is None else settings.temperature
        self.sampling = {"temperature": temperature, "top_p": settings.top_p, "top_k": 0, "max_tokens": longest}

    def run(
        self, engine: Engine | Fleet, rewards: RewardPool, phases: Phases, step: int, steps: int, polling: Polling = lambda on_progress: on_progress
    ) -> Evaluation:
        """Sample and judge. The same random numbers every time, so that two evaluations differ by their weights alone.

        Args:
            polling: makes of a progress callback one that may also raise, to give up.
        """
        samples = self._settings.samples
        with phases.phase("eval", step, steps) as on_progress:
            polled = polling(on_progress)
            groups = engine.generate(self.prompts, samples, seed=self._seed, on_progress=polled, sampling=self.sampling)
            scores = rewards.score([(sample.prompt, sample.text) for group in groups for sample in group], polled)
        rows = [scores[i : i + samples] for i in range(0, len(scores), samples)]
        return Evaluation(groups, rows, self._settings.confidence)


def evaluate_model(config: Config, out: str | None = None) -> dict[str, Any]:
    """``megatron-espo eval``: judge the model in ``model.path``; print a table, write JSON (default ``<run.dir>/eval.json``), return it.

    Raises:
        InputError: bad rows, tokenizer, reward function or model folder.
    """
    os.makedirs(config.run.dir, exist_ok=True)
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.path, config.model.path)
    max_model_len = config.rollout.max_model_len or config.validate_model()["max_position_embeddings"]
    evaluator = Evaluator(config, tokenizer, max_model_len)
    with RewardPool(config.reward) as rewards, Engine(
        engine_config(config, tokenizer, max_model_len, load_weights=True), tokenizer.decode
    ).start() as engine:
        rewards.start()
        print(f"loading {config.model.path}; the engine's log: {engine.config.log_path}", flush=True)
        engine.wait_ready()
        phases = Phases(draw=True)
        evaluation = evaluator.run(engine, rewards, phases, 1, 1)
    record = evaluation.record(model=config.model.path, prompts_from=config.eval.prompts or config.data.prompts, sampling=evaluator.sampling)
    path = Path(out or Path(config.run.dir, "eval.json"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record | {"seconds": round(phases.seconds["eval"], 1)}, indent=1) + "\n", encoding="utf-8")
    print(render_table(record["metrics"], len(evaluation.rollouts), evaluation.confidence))
    print(f"results: {path}")
    return record
