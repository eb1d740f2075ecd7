"""What a run tells while it runs: metrics, entropy histograms and samples, in files, in TensorBoard and on the terminal."""

import importlib
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_espo.batch import ScoredGroups
from megatron_espo.config import Config
from megatron_espo.data.tokenizer import Tokenizer
from megatron_espo.entropies import EntropyRecorder, EntropyReport
from megatron_espo.errors import InputError
from megatron_espo.mcore.runtime import Runtime
from megatron_espo.metrics import MetricsWriter, rollout_metrics, step_line
from megatron_espo.run_files import keep_steps
from megatron_espo.samples import Place, choose_samples, sample_record, spread
from megatron_espo.throughput import peak_flops, system_metrics, training_flops

_GAP_ADVICE = "compare dtypes, temperature and weights of trainer and engine"


class LogProbGap(RuntimeError):
    """Engine and trainer disagree about the same tokens by more than ``rollout.log_prob_gap_stop``."""


class Reporter:
    """Every rank has one, because entropies are on the last pipeline stage; rank 0 writes.

    Args:
        config: the run's configuration.
        hf_config: the model's ``config.json``.
        runtime: this rank's place.
        tokenizer: rank 0's, for the text of samples; ``None`` elsewhere.

    Raises:
        InputError: ``run.wandb`` without the package.
    """

    def __init__(self, config: Config, hf_config: dict[str, Any], runtime: Runtime, tokenizer: Tokenizer | None) -> None:
        if config.run.wandb and importlib.util.find_spec("wandb") is None:
            raise InputError("run.wandb: expected the package wandb, found none; pip install wandb, or set it to false")
        self.config, self._hf_config, self._runtime, self._tokenizer = config, hf_config, runtime, tokenizer
        self._recorder = EntropyRecorder(
            len(config.algorithm.quantiles) + 1,
            hf_config["vocab_size"],
            speaks=runtime.groups.tp.rank() == 0 and runtime.groups.cp.rank() == 0,
            device=runtime.device,
        )
        self.observe = self._recorder.observe
        self._places: list[Place] = []
        self._folder = Path(config.run.dir)
        self._writer: MetricsWriter | None = None

    def open(self, after_step: int) -> None:
        """Open the files. What an earlier part of the run wrote about steps after ``after_step`` is taken back."""
        if self._runtime.is_main:
            self._writer = MetricsWriter(self._folder, self._start_wandb(), after_step)
            for name in ("samples.jsonl", "entropy.jsonl", "eval.jsonl"):
                keep_steps(self._folder / name, after_step)

    def _start_wandb(self) -> Any:
        run = self.config.run
        if not run.wandb:
            return None
        wandb = importlib.import_module("wandb")
        return wandb.init(name=run.name or run.dir, dir=run.dir, config=self.config.model_dump(mode="json"))

    def watch(self, groups: ScoredGroups) -> dict[Place, int]:
        """Before a step's training: the responses to show, ``(prompt, sample)``, with the numbers to watch them under."""
        self._places = choose_samples(groups.rewards, self.config.run.samples_per_step)
        samples = [groups.rollouts[prompt][sample] for prompt, sample in self._places]
        self._recorder.watch([int(sample.loss_mask.sum()) for sample in samples])
        return {place: number for number, place in enumerate(self._places)}

    def write(
        self, step: int, groups: ScoredGroups, advantages: torch.Tensor, metrics: dict[str, float], seconds: dict[str, float]
    ) -> None:
        """After a step: write everything, print one line. Collective: one all-reduce.

        Args:
            metrics: of training, and of the evaluation where there was one.
            seconds: by phase, and ``step``.

        Raises:
            LogProbGap: on every rank; the step is not written.
        """
        refuse_gap(metrics, self.config.rollout.log_prob_gap_stop)
        entropies = self._recorder.gather()
        if self._writer is None:
            return
        metrics = metrics | rollout_metrics(groups.rollouts, groups.rewards, advantages) | entropies.metrics()
        metrics["rollout/staleness"] = groups.staleness(step)
        metrics["rollout/staleness_max"] = float(groups.max_staleness(step))
        metrics |= {f"time/{name}_s": value for name, value in seconds.items()}
        metrics |= self._throughput(groups, advantages, metrics) | system_metrics()
        self._writer.write(step, metrics)
        self._write_entropies(step, entropies)
        self._write_samples(step, groups, advantages, entropies)
        print(step_line(step, self.config.run.steps, metrics), flush=True)
        if not groups.max_staleness(step):  # older weights explain a gap
            warn_of_gap(metrics, self.config.rollout.log_prob_gap_warn)

    def close(self) -> None:
        """Flush and close the files."""
        if self._writer is not None:
            self._writer.close()

    def _throughput(self, groups: ScoredGroups, advantages: torch.Tensor, metrics: dict[str, float]) -> dict[str, float]:
        found = {}
        if metrics.get("time/rollout_s"):
            found["throughput/response_tokens_per_s"] = float(groups.lengths().sum()) / metrics["time/rollout_s"]
        train_s, peak = metrics.get("time/train_s"), peak_flops(self.config.model.dtype)
        if train_s and "train/tokens" in metrics:
            found["throughput/trained_tokens_per_s"] = metrics["train/tokens"] / train_s
            if peak:
                trained = [
                    len(part.prompt_ids) + len(part.response_ids)
                    for row, values in zip(groups.rollouts, advantages.tolist(), strict=True)
                    for sample, advantage in zip(row, values, strict=True)
                    if advantage
                    for part in sample.parts
                ]
                flops = training_flops(self._hf_config, trained) * self.config.algorithm.num_epochs
                found["throughput/mfu"] = flops / (train_s * peak * dist.get_world_size())
        return found

    def _write_entropies(self, step: int, entropies: EntropyReport) -> None:
        for group, counts in enumerate(entropies.counts):
            self._writer.histogram(f"entropy/group{group}", counts, entropies.edges, step)
        self._append("entropy.jsonl", {"step": step, "highest": entropies.edges[-1], "counts": entropies.counts, "borders": entropies.borders})

    def _write_samples(self, step: int, groups: ScoredGroups, advantages: torch.Tensor, entropies: EntropyReport) -> None:
        for number, (prompt, sample) in enumerate(self._places):
            record = sample_record(
                step,
                groups.rollouts[prompt][sample],
                float(groups.rewards[prompt, sample]),
                float(advantages[prompt, sample]),
                self._tokenizer.decode,
            )
            record |= {"entropies": None, "groups": None}
            if found := entropies.tokens[number]:
                values, members = found
                record["entropies"] = spread([round(value, 4) for value in values], record["mask"])
                record["groups"] = spread(members, record["mask"])
            self._append("samples.jsonl", record)
            self._writer.text(f"samples/{number}", as_markdown(record), step)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        with open(self._folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(_without_nan(record)) + "\n")


def as_markdown(record: dict[str, Any]) -> str:
    """A sample for TensorBoard: the tokens of the highest entropy group are bold."""
    highest = max((group for group in record["groups"] or [] if group is not None), default=0)
    words = []
    for number, piece in enumerate(record["pieces"]):
        marked = record["groups"] and highest and record["groups"][number] == highest and piece.strip()
        # A line break inside asterisks would end them; indented text would become a code block.
        text = piece.replace("*", "\\*").replace("\n", "  \n")
        body = text.strip()
        words.append(text.replace(body, f"**{body}**", 1) if marked else text)
    prompt = "".join(f"    {line}\n" for line in record["prompt"].splitlines())
    head = f"reward **{record['reward']}**, advantage {record['advantage']:.3g}, {len(record['tokens'])} tokens, {record['finish_reason']}"
    return f"{head}\n\n{prompt}\n{''.join(words)}"


def warn_of_gap(metrics: dict[str, float], limit: float) -> None:
    """Say it when engine and trainer disagree about the same tokens: stale weights, or two different sampling distributions."""
    gap = metrics.get("mismatch/logprob_gap_mean", 0.0)
    if not gap <= limit:
        print(
            f"warning: mean |engine - trainer| log-prob gap {gap:.3g} nats, above rollout.log_prob_gap_warn = {limit:g}: {_GAP_ADVICE}",
            flush=True,
        )


def refuse_gap(metrics: dict[str, float], limit: float | None) -> None:
    """LogProbGap above ``limit``; NaN is above every limit."""
    gap = metrics.get("mismatch/logprob_gap_mean", 0.0)
    if limit is not None and not gap <= limit:
        raise LogProbGap(f"mean |engine - trainer| log-prob gap {gap:.3g} nats, above rollout.log_prob_gap_stop = {limit:g}: {_GAP_ADVICE}")


def _without_nan(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    return {name: plain(value) for name, value in record.items()}
