"""Evaluation of held-out prompts during a run or of a model folder: avg@k, pass@k, intervals."""

import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_espo.config import Config
from megatron_espo.config.checks import check_model, fail
from megatron_espo.data.prompts import PromptStream
from megatron_espo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_espo.errors import InputError
from megatron_espo.monitoring.progress import Phases
from megatron_espo.rewards.pool import wait_or_cancel
from megatron_espo.rollout.engine import Sampling
from megatron_espo.rollout.http_client import LoopThread
from megatron_espo.rollout.pool import EnginePool, request_seeds
from megatron_espo.rollout.runner import EnvironmentRunner, close_environment, load_environment
from megatron_espo.rollout.scorer import Scorer
from megatron_espo.rollout.server import EngineConfig
from megatron_espo.rollout.transport import engine_devices, resolve_transport
from megatron_espo.rollout.vllm_engine import VLLMEngine
from megatron_espo.types import Trajectory

RESAMPLES = 5000
CONFIDENCE = 0.95  # level of the intervals
# Entries of a reasoning-gym task without its own seed must differ from those of the training run.
_SEED_OFFSET = 1_000_003


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimate the chance that one of ``k`` responses is correct, without bias.

    ``1 - C(n - c, k) / C(n, k)`` (Chen et al., 2021).

    Args:
        n: responses.
        c: correct responses among them.
        k: at most ``n``.
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def bootstrap_interval(
    values: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of ``values``, one for each prompt.

    Draws ``RESAMPLES`` samples of the prompts with replacement. If all values are equal, the
    interval is a point.
    """
    column = np.asarray(values, dtype=np.float64)
    count, generator = len(column), np.random.default_rng(0)
    # A loop: one array would hold RESAMPLES x prompts numbers.
    means = [column[generator.integers(0, count, count)].mean() for _ in range(RESAMPLES)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def evaluation_record(rollouts: list[list[Trajectory]], **head: Any) -> dict[str, Any]:
    """Return JSON values: ``head``, the metrics, rewards and response lengths by prompt.

    The metrics are ``eval/*``: avg@n, pass@k, their intervals, mean reward and length, failures.
    ``k`` is every power of two up to the ``n`` responses of a prompt, and ``n``. A response is
    correct with a reward of at least 1. One without a score (NaN) counts as wrong; its reward is
    ``None`` in the record.

    Args:
        rollouts: ``[prompt][sample]`` with rewards.
    """
    n = len(rollouts[0])
    rewards = np.array([[sample.reward for sample in group] for group in rollouts], np.float64)
    lengths = [[sample.num_trained for sample in group] for group in rollouts]
    correct = np.count_nonzero(rewards >= 1, axis=1).tolist()
    columns = {f"avg@{n}": [c / n for c in correct]}
    for k in sorted({2**i for i in range(n.bit_length())} | {n}):
        columns[f"pass@{k}"] = [pass_at_k(n, c, k) for c in correct]
    metrics: dict[str, float] = {}
    for name, values in columns.items():
        key = f"eval/{name}"
        metrics[key] = float(np.mean(values))
        metrics[f"{key}_low"], metrics[f"{key}_high"] = bootstrap_interval(values)
    is_failed = np.isnan(rewards)
    if not is_failed.all():
        metrics["eval/reward_mean"] = float(rewards[~is_failed].mean())
    metrics["eval/length_mean"] = float(np.mean(lengths))
    truncated = [sample.truncated for group in rollouts for sample in group]
    metrics["eval/truncated"] = float(np.mean(truncated))
    metrics["eval/failed"] = float(is_failed.sum())
    prompts = []
    for group, row, own_lengths in zip(rollouts, rewards.tolist(), lengths, strict=True):
        scores = [None if math.isnan(reward) else reward for reward in row]
        prompts.append({"id": group[0].prompt.id, "rewards": scores, "lengths": own_lengths})
    return head | {"metrics": metrics, "confidence": CONFIDENCE, "prompts": prompts}


def render_table(record: dict[str, Any]) -> str:
    """Format the metrics of an :func:`evaluation_record` for a terminal."""
    count, metrics = len(record["prompts"]), record["metrics"]
    lines = [f"{count} prompts, {CONFIDENCE:.0%} bootstrap intervals over prompts"]
    for key, value in metrics.items():
        if not key.endswith(("_low", "_high")):
            line = f"  {key.removeprefix('eval/'):<12} {value:>10.4f}"
            if f"{key}_low" in metrics:
                line += f"   {metrics[f'{key}_low']:.4f} – {metrics[f'{key}_high']:.4f}"
            lines.append(line)
    return "\n".join(lines)


def engine_config(
    config: Config,
    max_model_len: int,
    *,
    expert_layers: list[int] | None = None,
    load_weights: bool = False,
    listen: str | None = None,
) -> EngineConfig:
    """Return the settings of this rank's rollout engine.

    Args:
        expert_layers: layers whose experts are returned; ``None``: no experts are.
        load_weights: load the weights of the model folder, in a child process on this machine.
        listen: address of its server; ``None``: chosen by the server.
    """
    rollout, rank = config.rollout, int(os.environ.get("RANK", "0"))
    hosts = () if load_weights else rollout.hosts
    # Each rank with an engine begins with another host.
    first = rank * rollout.engines // int(os.environ.get("WORLD_SIZE", "1"))
    # A keeper on another machine may run in another folder.
    resolve = os.path.abspath if hosts else str
    return EngineConfig(
        model=resolve(config.model.path),
        folder=resolve(config.run.dir),
        log_name=f"engine-rank{rank}.log" if rank else "engine.log",
        dtype=config.model.dtype,
        transport="" if load_weights else resolve_transport(rollout),
        max_model_len=max_model_len,
        temperature=rollout.temperature,
        seed=config.run.seed,
        tensor_parallel_size=rollout.tensor_parallel_size,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        timeout_s=rollout.timeout_s,
        visible_devices=None if hosts else engine_devices(rollout),
        hosts=hosts[first:] + hosts[:first],
        host_timeout_s=rollout.host_timeout_s,
        listen=listen,
        sleep=rollout.sleep and not load_weights,
        routed_experts=expert_layers is not None,
        expert_layers=expert_layers or [],
        sampling_masks=rollout.truncates and not load_weights,
        quantization=rollout.quantization,
        load_weights=load_weights,
        engine_args=rollout.engine_args,
    )


class Evaluator:
    """Samples and scores the prompts of ``eval.prompts`` (without it: of ``data.prompts``).

    Args:
        config: the run's configuration.
        tokenizer: the trainer's.
        max_model_len: the engine's context.

    Raises:
        InputError: bad rows.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, max_model_len: int) -> None:
        settings, rollout = config.eval, config.rollout
        source = config.sources.get("eval") or config.sources.get("data")
        if source is None:
            fail(config, "eval.prompts", "expected prompts with data.mixture, got null")
        changes = source.model_dump(exclude={"weight", "pass_rate"})
        changes |= {"shuffle": False, "mixture": {}, "pass_rate": ()}
        stream = PromptStream(
            config.data.model_copy(update=changes),
            tokenizer,
            config.run.seed + _SEED_OFFSET,
            max_response_tokens=rollout.max_response_tokens,
            max_model_len=max_model_len,
        )
        self.prompts = stream.take(min(len(stream), settings.max_prompts or len(stream)))
        self._samples, self._seed = settings.samples, config.run.seed
        # With the limits of the run, because the engine returns the kept ids of every request:
        # without limits the vocabulary.
        self.sampling = Sampling.of(rollout, tokenizer.eos_ids)
        if settings.temperature is not None:
            self.sampling = replace(self.sampling, temperature=settings.temperature)

    def run(
        self,
        runner: EnvironmentRunner,
        scorer: Scorer,
        phases: Phases,
        step: int,
        steps: int,
        check: Callable[[], None],
    ) -> list[list[Trajectory]]:
        """Sample and score. The seeds are the same in every call: only the weights differ.

        Args:
            check: called several times a second; an exception ends the evaluation.

        Returns:
            ``[prompt][sample]`` with rewards.
        """
        seeds = request_seeds(self.prompts, self._samples, self._seed)
        with phases.phase("eval", step, steps, check) as on_progress:
            futures: list[Future[Trajectory]] = []
            for i, (prompt, own) in enumerate(zip(self.prompts, seeds, strict=True)):
                sampling = replace(self.sampling, slot=i)
                futures += runner.start(prompt, f"eval{step}.{i}", sampling, own)
            samples = wait_or_cancel(futures, on_progress)
            scored = wait_or_cancel([scorer.submit(sample) for sample in samples], on_progress)
        starts = range(0, len(scored), self._samples)
        return [scored[start : start + self._samples] for start in starts]


def evaluate_model(config: Config, out: str | None) -> None:
    """Run ``megatron-espo eval``: evaluate ``model.path`` and print a table.

    Args:
        out: JSON file to write; ``None``: ``<run.dir>/eval.json``.

    Raises:
        InputError: bad rows, tokenizer, reward function, judge, model folder or ``out``.
    """
    run_dir, model, limits = config.run.dir, config.model.path, config.environment
    path = Path(out or Path(run_dir, "eval.json"))
    if path.is_dir():
        raise InputError(f"--out: expected a file, got the folder {path}")
    for folder in (run_dir, path.parent):
        os.makedirs(folder, exist_ok=True)
    tokenizer = load_tokenizer(config.model.tokenizer or model, model, config.data.template_args)
    length = config.rollout.max_model_len or check_model(config).max_position_embeddings
    evaluator = Evaluator(config, tokenizer, length)
    environment = load_environment(limits.name, limits.args)
    loop, phases = LoopThread(), Phases(draw=True)
    engine = VLLMEngine(engine_config(config, length, load_weights=True), loop)
    scorer = Scorer(config, tokenizer, loop)
    with ExitStack() as closing:
        closing.callback(loop.close)
        closing.callback(close_environment, environment, loop)
        closing.callback(engine.close)
        closing.callback(scorer.close)
        engine.start()
        scorer.start()
        print(f"loading {model}; the engine's log: {engine.config.log_path}", flush=True)
        engine.wait_ready()
        pool = EnginePool(run_dir, config.rollout.timeout_s)
        loop.run(pool.connect([engine.address]))
        closing.callback(lambda: loop.run(pool.close()))
        runner = EnvironmentRunner(environment, pool, tokenizer, loop, limits.timeout_s, length)
        rollouts = evaluator.run(runner, scorer, phases, 1, 1, pool.check)
    record = evaluation_record(
        rollouts,
        model=model,
        prompts_from=config.eval.prompts or config.data.prompts,
        sampling=evaluator.sampling.as_json(),
    )
    record["seconds"] = round(phases.seconds["eval"], 1)
    print(render_table(record), flush=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"results: {path}")
