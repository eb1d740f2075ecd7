"""Logs a step: metrics, entropy histograms and samples, to files, TensorBoard and the terminal."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_espo.config import Config
from megatron_espo.data.scored_groups import ScoredGroups
from megatron_espo.data.tokenizer import Tokenizer
from megatron_espo.distributed.runtime import Runtime
from megatron_espo.errors import InputError
from megatron_espo.files import keep_steps
from megatron_espo.models.spec import ExternalSpec, ModelSpec
from megatron_espo.monitoring.entropy import EntropyRecorder
from megatron_espo.monitoring.metrics import rollout_metrics, step_line
from megatron_espo.monitoring.report.runs import LARGE_GAP
from megatron_espo.monitoring.samples import SampleIndex, as_markdown, choose_samples, sample_record
from megatron_espo.monitoring.throughput import peak_flops, system_metrics, training_flops


class LogProbGap(RuntimeError):
    """The log-probs of engine and trainer differ by more than ``rollout.log_prob_gap_stop``."""


class Reporter:
    """Logs steps. Every rank has a reporter, because the last pipeline stage has the entropies;
    rank 0 writes.

    Args:
        config: the run's configuration.
        spec: the model.
        runtime: rank and process groups.
        tokenizer: decodes samples on rank 0; not used on other ranks.

    Attributes:
        record: :meth:`EntropyRecorder.record` on one of the ranks that see the same responses,
            ``None`` on the others.

    Raises:
        InputError: ``run.wandb`` without the package.
    """

    def __init__(
        self, config: Config, spec: ModelSpec, runtime: Runtime, tokenizer: Tokenizer | None
    ) -> None:
        if config.run.wandb and importlib.util.find_spec("wandb") is None:
            raise InputError(
                "run.wandb: expected the package wandb, found none; "
                "pip install wandb, or set it to false"
            )
        self.config, self._spec, self._runtime = config, spec, runtime
        self._tokenizer, self._folder = tokenizer, Path(config.run.dir)
        num_groups = len(config.algorithm.quantiles) + 1
        self._recorder = EntropyRecorder(num_groups, spec.vocab_size, runtime.device)
        records = runtime.groups.tp.rank() == 0 and runtime.groups.cp.rank() == 0
        self.record = self._recorder.record if records else None
        self._logged: list[SampleIndex] = []
        self._board: Any = None  # on other ranks too

    def open(self, after_step: int) -> None:
        """Open TensorBoard on rank 0; Weights & Biases copies what TensorBoard gets.

        Removes what an earlier part of the run wrote for steps after ``after_step``.
        """
        if not self._runtime.is_main:
            return
        from torch.utils.tensorboard import SummaryWriter

        run, settings = self.config.run, self.config.model_dump(mode="json")
        if run.wandb:
            import wandb

            wandb.init(name=run.dir, dir=run.dir, config=settings, sync_tensorboard=True)
        self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=after_step + 1)
        for name in ("metrics", "samples", "entropy", "eval"):
            keep_steps(self._folder / f"{name}.jsonl", after_step)

    def start_step(self, groups: ScoredGroups) -> dict[SampleIndex, int]:
        """Choose the samples to log, before training.

        Returns their numbers by ``(prompt, sample)``.
        """
        self._logged = choose_samples(groups.rewards, self.config.run.samples_per_step)
        samples = [groups.rollouts[prompt][sample] for prompt, sample in self._logged]
        self._recorder.start_step([int(sample.loss_mask.sum()) for sample in samples])
        return {index: number for number, index in enumerate(self._logged)}

    def write(
        self,
        step: int,
        groups: ScoredGroups,
        advantages: torch.Tensor,
        metrics: dict[str, float],
        seconds: dict[str, float],
    ) -> None:
        """Write a step's metrics and samples after training, and print one line. Collective:
        :meth:`EntropyRecorder.gather`.

        Args:
            step: counted from 1.
            groups: the step's rollouts.
            advantages: ``[prompts, group_size]``.
            metrics: of training and evaluation.
            seconds: by phase, and ``step``.

        Raises:
            LogProbGap: on every rank. The step is not written.
        """
        gap = metrics.get("mismatch/logprob_gap_mean", 0.0)
        limit = self.config.rollout.log_prob_gap_stop
        if limit is not None and not gap <= limit:
            raise LogProbGap(_gap_message(gap, f"rollout.log_prob_gap_stop = {limit:g}"))
        histogram, entropies = self._recorder.gather()
        if self._board is None:
            return
        metrics = metrics | rollout_metrics(groups.rollouts, groups.rewards, advantages)
        metrics |= groups.metrics
        for number, boundary in enumerate(histogram["boundaries"], 1):
            if boundary is not None:
                metrics[f"entropy/boundary{number}"] = boundary
        metrics["rollout/staleness"] = groups.staleness(step)
        metrics["rollout/staleness_max"] = float(groups.max_staleness(step))
        metrics |= {f"time/{name}_s": value for name, value in seconds.items()}
        metrics |= self._throughput(groups, advantages, metrics) | system_metrics()
        self._append("metrics.jsonl", {"step": step} | metrics)
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        self._append("entropy.jsonl", {"step": step} | histogram)
        assert self._tokenizer
        for number, (i, j) in enumerate(self._logged):
            values = float(groups.rewards[i, j]), float(advantages[i, j])
            rollout, decode = groups.rollouts[i][j], self._tokenizer.decode
            record = sample_record(step, rollout, *values, decode, entropies[number])
            self._append("samples.jsonl", record)
            self._board.add_text(f"samples/{number}", as_markdown(record), step)
        self._board.flush()
        print(step_line(step, self.config.run.steps, metrics), flush=True)
        # Older weights explain a gap. NaN is a gap.
        if not gap <= LARGE_GAP and not groups.max_staleness(step):
            print(f"warning: {_gap_message(gap, f'{LARGE_GAP:g}')}", flush=True)

    def close(self) -> None:
        """Flush and close the files."""
        if self._board is not None:
            self._board.close()

    def _throughput(
        self, groups: ScoredGroups, advantages: torch.Tensor, metrics: dict[str, float]
    ) -> dict[str, float]:
        generated, trained = float(groups.lengths().sum()), metrics["train/tokens"]
        ranks, train_s = dist.get_world_size(), metrics["time/train_s"]
        step_s, peak = metrics["time/step_s"], peak_flops(self.config.model.dtype)
        found = {
            "throughput/generated_tokens_per_s_per_gpu": generated / (step_s * ranks),
            "throughput/trained_tokens_per_s_per_gpu": trained / (step_s * ranks),
            "throughput/trained_tokens_per_s": trained / train_s,
        }
        if rollout_s := metrics.get("time/rollout_s"):
            found["throughput/response_tokens_per_s"] = generated / rollout_s
        if peak and not isinstance(self._spec, ExternalSpec):
            algorithm = self.config.algorithm
            trains_all = bool(algorithm.kl_coef or algorithm.entropy_coef)
            samples = zip(groups.samples, advantages.flatten().tolist(), strict=True)
            parts = (p for sample, value in samples if value or trains_all for p in sample.parts)
            lengths = [len(part.prompt_ids) + len(part.response_ids) for part in parts]
            flops = training_flops(self._spec, lengths) * self.config.algorithm.num_epochs
            found["throughput/mfu"] = flops / (train_s * peak * ranks)
        return found

    def _append(self, name: str, record: dict[str, Any]) -> None:
        with open(self._folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _gap_message(gap: float, limit: str) -> str:
    return (
        f"mean |engine - trainer| log-prob gap {gap:.3g} nats, above {limit}: "
        "compare dtypes, temperature and weights of trainer and engine"
    )
