"""The training loop: the one file that knows every stage.

    prompts -> rollouts -> rewards -> advantages -> log-probs, entropy groups and the ESPO loss in Megatron's schedule -> weights -> engine

Left out on purpose: checkpoints for resuming, asynchronous rollouts, several engines.
"""

import time
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_espo.algo import group_advantages, overlong_penalty
from megatron_espo.batch import ScoredGroups
from megatron_espo.collect import Collector
from megatron_espo.config import Config
from megatron_espo.data.packing import TrainSequence
from megatron_espo.mcore import runtime as mcore_runtime
from megatron_espo.mcore.learner import Learner
from megatron_espo.progress import Phases
from megatron_espo.report import draw_learning_curve, write_summary
from megatron_espo.reporter import Reporter
from megatron_espo.weights.hf_io import save_hf
from megatron_espo.weights.sync import WeightSync


def train(config: Config) -> None:
    """Run ``config.run.steps`` rollout batches. Called on every rank; collective.

    Writes under ``config.run.dir``: ``config.json``, ``metrics.jsonl``, ``samples.jsonl``, ``entropy.jsonl``, ``tensorboard/``, ``summary.json``,
    ``learning_curve.png``, ``engine.log`` and, with ``run.save_hf``, the trained model in ``hf/``.
    """
    start, hf_config = time.perf_counter(), config.validate_model()
    folder = Path(config.run.dir)
    runtime = mcore_runtime.initialize(**mcore_runtime.parallel_sizes(config.megatron), seed=config.run.seed)
    if runtime.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        folder.joinpath("config.json").write_text(config.model_dump_json(indent=2) + "\n")
    collector = Collector(config, hf_config, runtime)
    try:
        phases = Phases(runtime.is_main)
        if runtime.is_main:
            print(f"loading {config.model.path} on {runtime.world_size} ranks; the engine's log: {folder / 'engine.log'}", flush=True)
        reporter = Reporter(config, hf_config, runtime, collector.tokenizer)
        learner = Learner(config, hf_config, runtime, reporter.observe)
        sync = WeightSync(config, hf_config, learner.chunks, runtime, collector.engine)
        sync.push(version=0)
        for step in range(1, config.run.steps + 1):
            began = time.perf_counter()
            groups = collector.collect(step, phases)
            advantages = advantages_of(groups, config)
            sequences = train_sequences(groups, advantages, config.algorithm.mask_truncated, reporter.watch(groups))
            with phases.phase("train", step, config.run.steps) as on_progress:
                metrics = learner.update(sequences, on_progress)
            with phases.phase("sync", step, config.run.steps):
                sync.push(version=step)
            seconds = phases.take() | {"step": time.perf_counter() - began}
            reporter.write(step, groups, advantages, metrics, seconds)
        if config.run.save_hf:
            dtype = getattr(torch, config.model.dtype)
            save_hf(learner.chunks, hf_config, folder / "hf", config.model.path, runtime.groups, dtype)
        reporter.close()
        if runtime.is_main:
            summary = write_summary(folder, seconds=time.perf_counter() - start, seed=config.run.seed)
            picture = draw_learning_curve(folder, config.run.name)
            print(f"reward {summary['reward_first3']:.3f} -> {summary['reward_last3']:.3f}; picture: {picture}")
    finally:
        collector.close()
    mcore_runtime.shutdown()


def advantages_of(groups: ScoredGroups, config: Config) -> torch.Tensor:
    """``[prompts, group_size]`` advantages of the rewards, less the overlong penalty where one is configured."""
    rewards, buffer = groups.rewards, config.reward.overlong_buffer_tokens
    if buffer is not None:
        rewards = rewards + overlong_penalty(
            groups.lengths(),
            max_tokens=config.rollout.max_response_tokens,
            buffer_tokens=buffer,
            factor=config.reward.overlong_penalty,
        )
    return group_advantages(rewards, normalize_std=config.algorithm.normalize_std)


def train_sequences(
    groups: ScoredGroups, advantages: torch.Tensor, mask_truncated: bool, watched: Mapping[tuple[int, int], int]
) -> list[list[TrainSequence]]:
    """Each rollout with its advantage, by prompt; ``watched`` numbers those ``(prompt, sample)`` that are shown."""
    return [
        [
            TrainSequence(
                sample.prompt.token_ids,
                sample.response_ids,
                sample.logprobs,
                float(advantages[i, j]),
                masked=mask_truncated and sample.truncated,
                watched=watched.get((i, j)),
            )
            for j, sample in enumerate(rollouts)
        ]
        for i, rollouts in enumerate(groups.rollouts)
    ]
