"""Held-out prompts through an engine and the reward workers: every so many steps of a run, or for a model in a folder."""

import json
import math
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_espo.config import Config, Data
from megatron_espo.data.prompts import PromptStream
from megatron_espo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_espo.evaluation import Evaluation, render_table
from megatron_espo.progress import Phases
from megatron_espo.rewards import RewardPool
from megatron_espo.rollout.engine import Sampling
from megatron_espo.rollout.environments import load_environment
from megatron_espo.rollout.http_client import LoopThread
from megatron_espo.rollout.pool import connected_pool, request_seeds
from megatron_espo.rollout.runner import EnvironmentRunner, RunnerConfig, run_all
from megatron_espo.rollout.server import EngineConfig
from megatron_espo.rollout.transport import engine_devices, resolve_transport
from megatron_espo.rollout.vllm_engine import VLLMEngine
from megatron_espo.types import Trajectory

# Held-out entries of a reasoning-gym task without a seed of its own must not be the training run's.
_SEED_OFFSET = 1_000_003


def engine_config(
    config: Config, max_model_len: int, *, routed_experts: bool = False, load_weights: bool = False, listen: str | None = None
) -> EngineConfig:
    """What this rank's rollout engine is started with; with ``load_weights`` it is a child in any case."""
    rollout, rank = config.rollout, int(os.environ.get("RANK", "0"))
    hosts = () if load_weights else rollout.hosts
    own = rank * rollout.engines // int(os.environ.get("WORLD_SIZE", "1"))  # each owner begins with another host
    return EngineConfig(
        # A keeper on another machine may run in another folder.
        model=os.path.abspath(config.model.path) if hosts else config.model.path,
        folder=os.path.abspath(config.run.dir) if hosts else config.run.dir,
        log_name=f"engine-rank{rank}.log" if rank else "engine.log",
        dtype=config.model.dtype if rollout.dtype == "auto" else rollout.dtype,
        transport="" if load_weights else resolve_transport(rollout.transport, rollout.visible_devices, bool(hosts)),
        max_model_len=max_model_len,
        temperature=rollout.temperature,
        seed=config.run.seed,
        tensor_parallel_size=rollout.tensor_parallel_size,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        timeout_s=rollout.timeout_s,
        start_timeout_s=rollout.timeout_s,
        visible_devices=None if hosts else engine_devices(rollout.visible_devices, rollout.engines, rollout.tensor_parallel_size, os.environ),
        hosts=hosts[own:] + hosts[:own],
        host_timeout_s=rollout.host_timeout_s,
        listen=listen,
        sleep=rollout.sleep and not load_weights,
        routed_experts=routed_experts,
        load_weights=load_weights,
        engine_args=rollout.engine_args,
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
        self.sampling = Sampling(
            max_tokens=longest, temperature=temperature, top_p=settings.top_p, stop_token_ids=tuple(sorted(tokenizer.eos_ids))
        )

    def run(
        self, runner: EnvironmentRunner, rewards: RewardPool, phases: Phases, step: int, steps: int, check: Callable[[], None]
    ) -> Evaluation:
        """Sample and judge. The random numbers are the same each time, so that two evaluations differ by their weights alone.

        Args:
            check: called often while engines and verifiers work; what it raises ends the evaluation.
        """
        samples = self._settings.samples
        with phases.phase("eval", step, steps) as on_progress:

            def poll(finished: int, total: int) -> None:
                check()
                on_progress(finished, total)

            seeds = request_seeds(self.prompts, samples, self._seed)
            groups = run_all(runner, self.prompts, samples, seeds, self.sampling, f"eval{step}", poll)
            judged = [sample for group in groups for sample in group if sample.reward is None]
            scores = iter(rewards.score([(sample.prompt, sample.text) for sample in judged], poll))
        rows = [[_given(sample) if sample.reward is not None else next(scores) for sample in group] for group in groups]
        return Evaluation(groups, rows)


def _given(sample: Trajectory) -> float | None:
    return None if math.isnan(sample.reward) else sample.reward


def evaluate_model(config: Config, out: str | None = None) -> dict[str, Any]:
    """``megatron-espo eval``: judge the model in ``model.path``; print a table, write JSON (default ``<run.dir>/eval.json``), return it.

    Raises:
        InputError: bad rows, tokenizer, reward function or model folder.
    """
    os.makedirs(config.run.dir, exist_ok=True)
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.path, config.model.path)
    max_model_len = config.rollout.max_model_len or config.validate_model()["max_position_embeddings"]
    evaluator = Evaluator(config, tokenizer, max_model_len)
    environment, limits = load_environment(config.environment.name, config.environment.args), config.environment
    loop = LoopThread()
    engine = VLLMEngine(engine_config(config, max_model_len, load_weights=True), loop)
    with RewardPool(config.reward) as rewards, closing(loop), closing(engine):
        engine.start()
        rewards.start()
        print(f"loading {config.model.path}; the engine's log: {engine.config.log_path}", flush=True)
        engine.wait_ready()
        pool = loop.run(connected_pool(config.run.dir, config.rollout.timeout_s, [engine.address]))

        def check() -> None:
            if pool.failure is not None:
                raise pool.failure

        runner = EnvironmentRunner(
            environment, pool, tokenizer, loop, RunnerConfig(limits.max_concurrent, limits.timeout_s, limits.retries, max_model_len)
        )
        phases = Phases(draw=True)
        evaluation = evaluator.run(runner, rewards, phases, 1, 1, check)
        loop.run(pool.close())
    record = evaluation.record(model=config.model.path, prompts_from=config.eval.prompts or config.data.prompts, sampling=asdict(evaluator.sampling))
    path = Path(out or Path(config.run.dir, "eval.json"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record | {"seconds": round(phases.seconds["eval"], 1)}, indent=1) + "\n", encoding="utf-8")
    print(render_table(record["metrics"], len(evaluation.rollouts)))
    print(f"results: {path}")
    return record
