"""The training loop: the one file that knows every stage.

    prompts -> rollouts -> rewards -> advantages -> log-probs, entropy groups and the ESPO loss in Megatron's schedule -> weights -> engine

With ``rollout.max_staleness`` above 0 the engines go on sampling while a step is trained and while they take new weights.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_espo.algo import group_advantages, overlong_penalty
from megatron_espo.batch import ScoredGroups
from megatron_espo.checkpoints import Checkpoints
from megatron_espo.config import Config
from megatron_espo.data.packing import TrainSequence
from megatron_espo.ledger import Ledger
from megatron_espo.mcore import runtime as mcore_runtime
from megatron_espo.mcore.learner import Learner
from megatron_espo.progress import Phases
from megatron_espo.report import draw_learning_curve, write_summary
from megatron_espo.reporter import Reporter
from megatron_espo.rollout_manager import RolloutManager
from megatron_espo.status import reported
from megatron_espo.stopping import Stopped, StopRequest
from megatron_espo.turns import MemoryTurns, start_asleep
from megatron_espo.weights.hf_io import save_hf
from megatron_espo.weights.sync import NoSync, WeightSync


def train(config: Config) -> None:
    """Train until ``config.run.steps`` rollout batches are done, from the latest checkpoint on. Called on every rank; collective.

    Writes under ``config.run.dir``: ``config.json``, ``metrics.jsonl``, ``samples.jsonl``, ``entropy.jsonl``, ``tensorboard/``, ``checkpoints/``,
    ``rollouts/``, ``status.json``, ``summary.json``, ``learning_curve.png``, ``engine.log`` and, with ``run.save_hf``, the trained model in ``hf/``.
    """
    hf_config = config.validate_model()
    config.validate_router(hf_config)
    runtime = mcore_runtime.initialize(**mcore_runtime.parallel_sizes(config.megatron), seed=config.run.seed)
    with reported(config, runtime) as beat, Run(config, hf_config, runtime, beat) as run:
        for step in range(run.step + 1, config.run.steps + 1):
            began = time.perf_counter()
            groups = run.rollouts.collect(step, run.phases, run.turns.recover)
            advantages = advantages_of(groups, config)
            sequences = train_sequences(groups, advantages, config.algorithm.mask_truncated, run.reporter.watch(groups))
            run.turns.to_trainer(step)
            with run.phases.phase("train", step, config.run.steps) as on_progress:
                metrics = run.learner.update(sequences, on_progress)
            metrics |= run.turns.to_engine(version=step)
            run.finish_step(step, metrics, groups, advantages, began)
        run.finish()
    mcore_runtime.shutdown()


class Run:
    """Everything that lives as long as a run, built in the order in which a mistake can be told.

    Attributes:
        step: the last step that is trained, saved or not.
    """

    def __init__(self, config: Config, hf_config: dict[str, Any], runtime: mcore_runtime.Runtime, beat: Callable[..., None]) -> None:
        self.config, self.hf_config, self.runtime = config, hf_config, runtime
        self.folder, self.started = Path(config.run.dir), time.perf_counter()
        self.stop = StopRequest(self.folder, config.run.max_seconds)
        self.checkpoints = Checkpoints(config)
        checkpoint = self.checkpoints.find()
        self.rollouts = RolloutManager(config, hf_config, runtime, self.stop)
        self.phases, self.step = Phases(runtime.is_main, beat), 0
        self.reporter = Reporter(config, hf_config, runtime, self.rollouts.tokenizer)
        self.say(f"loading {config.model.path} on {runtime.world_size} ranks; the engine's log: {self.folder / 'engine.log'}")
        try:
            if config.rollout.sleep and not config.run.replay:
                start_asleep(self.rollouts.engine, config.rollout.timeout_s)
            self.learner = Learner(config, hf_config, runtime, self.reporter.observe)
            self.ledger = Ledger()
            if checkpoint:
                state = self.checkpoints.load(checkpoint, self.learner)
                self.step, self.ledger = state["step"], Ledger(**state["ledger"])
                self.rollouts.load_state_dict(state["rollouts"])
                self.say(f"going on after step {self.step} of {config.run.steps}, from {checkpoint}")
            if self.step >= config.run.steps:
                self.say(f"nothing to train: step {self.step} of {config.run.steps} is done; raise run.steps to go on")
            self.sync = self._connect()
            self.turns = MemoryTurns(config, self.learner, self.sync, self.phases)
            self.turns.to_engine(version=self.step)
            self.phases.take()  # not the first step's
        except BaseException:
            self.rollouts.close()
            raise
        if runtime.is_main:
            self.folder.joinpath("config.json").write_text(config.model_dump_json(indent=2) + "\n")
        self.reporter.open(after_step=self.step)

    def _connect(self) -> WeightSync | NoSync:
        if self.config.run.replay:
            return NoSync()
        rollouts = self.rollouts
        return WeightSync(
            self.config, self.hf_config, self.learner, self.runtime, rollouts.engine, rollouts.canary(), on_served=rollouts.connect
        )

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, *_) -> None:
        self.rollouts.close()
        self.reporter.close()
        if kind is Stopped and self.checkpoints.due_at_stop(self.step):
            self._save(go_on=False)

    def finish_step(self, step: int, metrics: dict[str, float], groups: ScoredGroups, advantages: torch.Tensor, began: float) -> None:
        """Count, report, and save where it is due. Collective. Raises Stopped, on all ranks, if one was asked to stop."""
        self.step = step
        self.ledger.count(groups)
        metrics |= self.rollouts.evaluate(step, self.phases, self.turns.recover)
        seconds = self.phases.take() | {"step": time.perf_counter() - began}
        self.reporter.write(step, groups, advantages, metrics | self.ledger.metrics(), seconds)
        reason = self.stop.agreed() if step < self.config.run.steps else None
        if reason:
            raise Stopped(reason)
        if self.checkpoints.due(step):
            self._save(go_on=step < self.config.run.steps)

    def _save(self, go_on: bool) -> None:
        with self.turns.whole(self.step, go_on=go_on), self.phases.phase("checkpoint", self.step, self.config.run.steps):
            state = {"step": self.step, "rollouts": self.rollouts.state_dict(), "ledger": vars(self.ledger)}
            path = self.checkpoints.save(self.step, self.learner, state)
        self.rollouts.forget(self.step)
        self.say(f"saved {path}")

    def finish(self) -> None:
        """Export the model, write summary and picture. Collective."""
        if self.config.run.save_hf:
            dtype, steps = getattr(torch, self.config.model.dtype), self.config.run.steps
            with self.turns.whole(steps, go_on=False), self.phases.phase("export", steps, steps):
                save_hf(self.learner.chunks, self.hf_config, self.folder / "hf", self.config.model.path, self.runtime.groups, dtype)
        if self.runtime.is_main:
            seconds = time.perf_counter() - self.started
            summary = write_summary(self.folder, seconds=seconds, seed=self.config.run.seed)
            picture = draw_learning_curve(self.folder, self.config.run.name)
            self.say(f"reward {summary['reward_first3']:.3f} -> {summary['reward_last3']:.3f}; picture: {picture}")

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.runtime.is_main:
            print(text, flush=True)


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
    groups: ScoredGroups, advantages: torch.Tensor, mask_truncated: bool, watched: Mapping[tuple[int, int], int] | None = None
) -> list[list[TrainSequence]]:
    """The sequences to train, by prompt: one for each part of a trajectory (``Trajectory.parts``), with the trajectory's advantage.

    Every part counts as a response of its own: N in the loss is the number of sequences returned here.

    Args:
        groups: the step's rollouts.
        advantages: ``[prompts, group_size]``.
        mask_truncated: whether truncated trajectories give no gradient.
        watched: numbers of the samples ``(prompt, sample)`` that are logged; the last part of the trajectory is logged.

    Raises:
        ValueError: a part without sampled tokens.
    """
    watched = watched or {}
    return [
        [
            TrainSequence(
                part.prompt_ids,
                part.response_ids,
                part.logprobs,
                float(advantages[i, j]),
                loss_mask=part.loss_mask,
                masked=sample.failed or (mask_truncated and sample.truncated),
                watched=watched.get((i, j)) if part is sample else None,
                routed_experts=part.routed_experts,
            )
            for j, sample in enumerate(rollouts)
            for part in sample.parts
        ]
        for i, rollouts in enumerate(groups.rollouts)
    ]
