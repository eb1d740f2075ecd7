"""The training loop.

    prompts -> rollouts -> rewards -> advantages -> segments -> pack -> [score] -> train -> weights
    -> next policy version

With ``rollout.max_staleness`` above 0 the engines continue to sample during training and weight
updates.
"""

import gc
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_espo.algo import (
    group_advantages,
    load_objective,
    overlong_penalty,
    zero_variance_signs,
)
from megatron_espo.config import Config
from megatron_espo.config.checks import check_model, check_router
from megatron_espo.data.packing import TrainSequence
from megatron_espo.data.scored_groups import ScoredGroups
from megatron_espo.distributed import runtime as distributed_runtime
from megatron_espo.distributed.runtime import Runtime
from megatron_espo.distributed.stop_request import Stopped, StopRequest
from megatron_espo.megatron.actor import Actor
from megatron_espo.models.spec import ModelSpec
from megatron_espo.monitoring.profiler import profiled
from megatron_espo.monitoring.progress import Phases
from megatron_espo.monitoring.report import draw_learning_curve, write_summary
from megatron_espo.monitoring.reporter import Reporter
from megatron_espo.monitoring.throughput import describe
from megatron_espo.trainer.checkpoints import Checkpoints
from megatron_espo.trainer.colocation import Colocation, start_asleep
from megatron_espo.trainer.ledger import Ledger
from megatron_espo.trainer.rollout_manager import RolloutManager
from megatron_espo.trainer.status import reported
from megatron_espo.weights.hf_io import save_hf
from megatron_espo.weights.sync import WeightSync


def train(config: Config) -> None:
    """Train for ``config.run.steps`` steps, starting from the latest checkpoint. Call on every
    rank; collective.

    Writes into ``config.run.dir``: ``config.json``, ``metrics.jsonl``, ``samples.jsonl``,
    ``entropy.jsonl``, ``tensorboard/``, ``checkpoints/``, ``rollouts/``, ``status.json``,
    ``summary.json``, ``learning_curve.png``, ``engine.log`` and, with ``run.save_hf``, the trained
    model in ``hf/``.
    """
    started, spec = time.perf_counter(), check_model(config)
    check_router(config, spec)
    # A wrong objective is an error before anything starts.
    load_objective(config.algorithm, max_response_tokens=config.rollout.max_response_tokens)
    sizes: dict[str, Any] = distributed_runtime.parallel_sizes(config.megatron)
    runtime = distributed_runtime.initialize(**sizes, seed=config.run.seed)
    with reported(config, runtime) as heartbeat, Run(config, spec, runtime, heartbeat) as run:
        for step in range(run.step + 1, config.run.steps + 1):
            with profiled(config.run, runtime.role, step):
                run.train_step(step)
        run.finish(seconds=time.perf_counter() - started)
    distributed_runtime.shutdown()


class Run:
    """The parts of a run. As a context manager it closes them, and saves a run that was asked to
    stop.

    The constructor builds the parts and loads the latest checkpoint. Collective. Cheap checks run
    first, so that user errors surface before the model loads.

    Attributes:
        step: the last trained step.
    """

    def __init__(
        self, config: Config, spec: ModelSpec, runtime: Runtime, heartbeat: Callable[..., None]
    ) -> None:
        self.config, self.runtime, folder = config, runtime, Path(config.run.dir)
        self.stop = StopRequest(folder, config.run.max_seconds)
        self.checkpoints = Checkpoints(config)
        checkpoint = self.checkpoints.find()
        self.rollouts = rollouts = RolloutManager(config, spec, runtime, self.stop)
        try:
            self.phases = Phases(runtime.is_main, heartbeat)
            self.reporter = Reporter(config, spec, runtime, rollouts.tokenizer)
            log = f"the engine's log: {folder / 'engine.log'}"
            self._log(f"loading {config.model.path} on {runtime.world_size} ranks; {log}")
            if config.rollout.sleep and not config.run.replay:
                start_asleep(rollouts.engine, config.rollout.timeout_s)
            self.actor = Actor(config, spec, runtime, self.reporter.record)
            if self.actor.updates_per_step == 1:
                self._log(
                    "warning: algorithm.num_mini_batches 1: with one update of each rollout batch "
                    "the importance ratio is 1 and nothing is clipped"
                )
            self.step, self.ledger, steps = 0, Ledger(), config.run.steps
            if checkpoint:
                state = self.checkpoints.load(checkpoint, self.actor)
                self.step, self.ledger = state["step"], Ledger(**state["ledger"])
                if rollouts.source:
                    rollouts.source.load_state_dict(state["rollouts"])
                self._log(f"continuing after step {self.step} of {steps}, from {checkpoint}")
            if self.step >= steps:
                done = f"step {self.step} of {steps} is done"
                self._log(f"nothing to train: {done}; raise run.steps to continue")
            sync = None
            if not config.run.replay:
                parts = (config, spec, self.actor, runtime, rollouts.engine, rollouts.canary())
                sync = WeightSync(*parts, on_served=rollouts.connect)
            self.colocation = Colocation(config, self.actor, sync, self.phases)
            self.colocation.update_engine(version=self.step)
            self.phases.pop()  # the first step does not count these seconds
        except BaseException:
            rollouts.close()
            raise
        if runtime.is_main:
            text = config.model_dump_json(indent=2) + "\n"
            folder.joinpath("config.json").write_text(text, encoding="utf-8")
        self.reporter.open(after_step=self.step)
        # A full garbage collection takes as long as the host work of a step: it does not visit the
        # modules and the model again.
        gc.freeze()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, *_) -> None:
        gc.unfreeze()
        try:
            self.rollouts.close()
            self.reporter.close()
        finally:
            if kind is Stopped:
                if self.checkpoints.due_at_stop(self.step):
                    self._save(last=True)
                self._finish_save(wait=True)

    def _log(self, text: str) -> None:
        """Print on rank 0."""
        if self.runtime.is_main:
            print(text, flush=True)

    def train_step(self, step: int) -> None:
        """Train one step, counted from 1. Write its metrics when its rollouts are durable on disk,
        complete a checkpoint whose files are written, and start the next one if it is due.
        Collective.

        Raises:
            Stopped: on every rank, if the run was asked to stop.
            OSError: on rank 0, if the step's rollouts were not written.
        """
        began, config = time.perf_counter(), self.config
        recover = partial(self.colocation.recover, step)
        # prompts -> rollouts -> rewards
        groups = self.rollouts.collect(step, self.phases, recover)
        advantages, signs = advantages_of(groups, config)
        logged = self.reporter.start_step(groups)
        mask_truncated = config.algorithm.mask_truncated
        sequences = train_sequences(groups, advantages, mask_truncated, logged, signs)
        # segments -> pack -> [score] -> train
        self.colocation.offload_engine(step)
        with self.phases.phase("train", step, config.run.steps) as on_progress:
            metrics = self.actor.update(sequences, on_progress)
        # weights -> next policy version
        metrics |= self.colocation.update_engine(version=step)
        metrics |= self.rollouts.evaluate(step, self.phases, recover)
        self.rollouts.wait_for_record()
        self.step, last = step, step == config.run.steps
        self.ledger.count(groups)
        metrics |= self.ledger.metrics()
        seconds = self.phases.pop() | {"step": time.perf_counter() - began}
        self.reporter.write(step, groups, advantages, metrics, seconds)
        if metrics.get("optimizer/grad_norm") == 0:
            what = "the gradient is zero; momentum and weight decay still move the weights"
            self._log(f"step {step}: {what}")
        self._finish_save(wait=False)
        if not last and (reason := self.stop.agreed()):
            raise Stopped(reason)
        if self.checkpoints.due(step):
            self._save(last=last)
        if last:
            self._finish_save(wait=True)

    def _save(self, last: bool) -> None:
        """Start to save this step. Waits for a save that is still running. Collective."""
        self._finish_save(wait=True)
        with (
            self.phases.counted_as("checkpoint"),
            self.colocation.all_on_device(self.step, last=last),
            self.phases.phase("checkpoint", self.step, self.config.run.steps),
        ):
            source, ledger = self.rollouts.source, vars(self.ledger)
            rollouts = source.state_dict() if source else None  # rank 0's state is saved
            state = {"step": self.step, "rollouts": rollouts, "ledger": ledger}
            self.checkpoints.save(self.step, self.actor, state)

    def _finish_save(self, wait: bool) -> None:
        """Complete the running save if its files are written, or wait for them. Collective."""
        if self.checkpoints.can_finish(wait=wait):
            with self.phases.phase("checkpoint", self.step, self.config.run.steps):
                step, path = self.checkpoints.finish()
            if self.rollouts.source:
                self.rollouts.source.forget(step)
            self._log(f"saved {path}")

    def finish(self, seconds: float) -> None:
        """Export the model, and write the summary (``seconds`` of the run) and the learning curve.

        Collective.
        """
        config, folder = self.config, Path(self.config.run.dir)
        if config.run.save_hf:
            dtype, steps = getattr(torch, config.model.dtype), config.run.steps
            with (
                self.colocation.all_on_device(steps, last=True),
                self.phases.phase("export", steps, steps),
            ):
                model, groups = (self.actor.chunks, self.actor.spec), self.runtime.groups
                paths = (folder / "hf", config.model.path)
                save_hf(*model, *paths, groups, dtype, tokenizer=config.model.tokenizer)
        if self.runtime.is_main:
            left = self.phases.pop().get("checkpoint", 0.0)
            summary = write_summary(folder, seconds, config.run.seed, checkpoint_s=left)
            for line in describe(summary["performance"]):
                self._log(line)
            picture = draw_learning_curve(folder)
            change = f"{summary['reward_first3']:.3f} -> {summary['reward_last3']:.3f}"
            self._log(f"reward {change}; picture: {picture}")


def advantages_of(groups: ScoredGroups, config: Config) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Advantages of the rewards, minus the overlong penalty if it is configured; and the signs of
    RL-ZVP, if it is. Both ``[prompts, group_size]``.
    """
    rewards, buffer = groups.rewards, config.reward.overlong_buffer_tokens
    if buffer is not None:
        rewards = rewards + overlong_penalty(
            groups.lengths(), max_tokens=config.rollout.max_response_tokens, buffer_tokens=buffer
        )
    advantages = group_advantages(rewards, config.algorithm.advantage)
    if not (scale := config.algorithm.zero_variance_scale):
        return advantages, None
    signs = zero_variance_signs(rewards)
    return advantages + scale * signs, signs


def train_sequences(
    groups: ScoredGroups,
    advantages: torch.Tensor,
    mask_truncated: bool,
    logged_sample: Mapping[tuple[int, int], int] | None = None,
    zero_variance: torch.Tensor | None = None,
) -> list[list[TrainSequence]]:
    """The sequences to train, by prompt: one for each part of a trajectory, with the advantage of
    the trajectory.

    Every part counts as a response: N in the loss is the number of sequences returned here.

    Args:
        groups: the step's rollouts.
        advantages: ``[prompts, group_size]``.
        mask_truncated: whether truncated trajectories give no gradient.
        logged_sample: index of each logged sample ``(prompt, sample)``; the last part of the
            trajectory is logged.
        zero_variance: ``[prompts, group_size]``, signs of RL-ZVP; ``None``: all 0.

    Raises:
        ValueError: a part without sampled tokens.
    """
    logged_sample, values = logged_sample or {}, advantages.tolist()
    signs = None if zero_variance is None else zero_variance.int().tolist()
    return [
        [
            TrainSequence(
                part.prompt_ids,
                part.response_ids,
                part.logprobs,
                values[i][j],
                loss_mask=part.loss_mask,
                masked=sample.failed or (mask_truncated and sample.truncated),
                logged_sample=logged_sample.get((i, j)) if part is sample else None,
                routed_experts=part.routed_experts,
                sampling_mask=part.sampling_mask,
                zero_variance=signs[i][j] if signs else 0,
            )
            for j, sample in enumerate(rollouts)
            for part in sample.parts
        ]
        for i, rollouts in enumerate(groups.rollouts)
    ]
