"""The trained policy of a run: builds Megatron's model from the configuration and updates it from rollouts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_espo.config import Config
from megatron_espo.data.packing import MicroBatch, TrainSequence, batch_totals, pack
from megatron_espo.mcore.canary import score_responses
from megatron_espo.mcore.forward_step import make_forward_step
from megatron_espo.mcore.model import Layout, build_model, use_transformer_engine
from megatron_espo.mcore.optimizer import Policy
from megatron_espo.mcore.runtime import Runtime
from megatron_espo.metrics import reduce_metrics
from megatron_espo.progress import OnProgress
from megatron_espo.weights.hf_io import load_hf_weights


def build_chunks(config: Config, hf_config: dict[str, Any], runtime: Runtime) -> list[torch.nn.Module]:
    """This rank's model chunks in the configured layout, with the weights of ``model.path``. Zero collectives."""
    layout = Layout(**{name: getattr(config.megatron, name) for name in Layout.__dataclass_fields__})
    dtype = getattr(torch, config.model.dtype)
    chunks = build_model(hf_config, layout, runtime.groups, dtype=dtype, transformer_impl=config.megatron.transformer_impl)
    load_hf_weights(chunks, hf_config, config.model.path, runtime.groups)
    return chunks


class Learner:
    """Megatron's model, DDP, optimizer and schedule, and the objective that drives them.

    Args:
        config: the run's configuration.
        hf_config: the model's ``config.json``.
        runtime: this rank's place.
    """

    def __init__(self, config: Config, hf_config: dict[str, Any], runtime: Runtime) -> None:
        self.config, self.groups = config, runtime.groups
        self.updates_per_step = config.algorithm.num_epochs * config.algorithm.num_mini_batches
        self.chunks = build_chunks(config, hf_config, runtime)
        self.policy = Policy(self.chunks, runtime.groups, config.optimizer, config.run.steps * self.updates_per_step)
        self._forward_step = make_forward_step(
            config.algorithm,
            groups=runtime.groups,
            vocab_size=hf_config["vocab_size"],
            temperature=config.rollout.temperature,
            max_response_tokens=config.rollout.max_response_tokens,
        )

    def update(self, groups: Sequence[Sequence[TrainSequence]], on_progress: OnProgress) -> dict[str, float]:
        """Train on one rollout batch: ``num_epochs`` passes over ``num_mini_batches`` optimizer steps.

        The old policy's log-probs and entropy groups are computed before the first of several optimizer steps. With exactly one there is no
        scoring pass: the policy is the old policy then, and the gradient is the same.

        Args:
            groups: responses by prompt, the same on every rank.

        Returns:
            The step's metrics on every rank, averaged over its optimizer steps. Collective over all ranks.
        """
        mini_batches = [self._pack(part) for part in _split(groups, self.config.algorithm.num_mini_batches)]
        count = sum(map(len, mini_batches))
        passes = self.config.algorithm.num_epochs + (self.updates_per_step > 1)
        tick = _Ticker(on_progress, count * passes)
        if self.updates_per_step > 1:
            mini_batches = [self._score(batches, tick) for batches in mini_batches]
        results = [
            self._metrics(self.policy.step(self._forward_step, batches, tick))
            for _ in range(self.config.algorithm.num_epochs)
            for batches in mini_batches
        ]
        return average(results)

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """Log-probs of each response's tokens given its prompt, on every rank; see ``canary.score_responses``."""
        return score_responses(self.policy, self._forward_step, pairs, multiple_of=self._multiple_of)

    @property
    def _multiple_of(self) -> int:
        megatron = self.config.megatron
        return megatron.tensor_model_parallel_size if megatron.sequence_parallel else 1

    def _pack(self, groups: Sequence[Sequence[TrainSequence]]) -> list[MicroBatch]:
        """This data-parallel rank's micro-batches of one optimizer step."""
        sequences = [sequence for group in groups for sequence in group]
        # Without advantage there is no gradient: such responses count in the denominators and cost nothing.
        kept = [sequence for sequence in sequences if sequence.advantage]
        tokens = sum(len(sequence.response_ids) for sequence in sequences)
        megatron = self.config.megatron
        return pack(
            kept,
            batch_totals(kept, num_responses=len(sequences), num_response_tokens=tokens),
            data_parallel_rank=self.groups.dp.rank(),
            data_parallel_size=self.groups.dp.size(),
            max_tokens=megatron.max_tokens_per_micro_batch,
            max_sequences=megatron.micro_batch_size,
            multiple_of=self._multiple_of,
            share_prompts=not use_transformer_engine(megatron.transformer_impl),  # whose attention knows no branches
        )

    def _score(self, batches: list[MicroBatch], tick: "_Ticker") -> list[MicroBatch]:
        """Attach the old policy's log-probs and annotation, on the last pipeline stage, where the loss is."""
        scored = self.policy.score(self._forward_step, batches, tick)
        if not scored:
            return batches
        return [
            replace(batch, old_logprob=old_logprob, annotation=annotation)
            for batch, (old_logprob, annotation) in zip(batches, scored, strict=True)
        ]

    def _metrics(self, result) -> dict[str, float]:
        """Loss metrics of the last stage, sent to every rank, with the optimizer's."""
        box = [reduce_metrics(result.metrics, self.groups.dp_cp)]
        # Pipeline stages are the outermost dimension of Megatron's rank order: the last rank is on the last stage.
        dist.broadcast_object_list(box, src=dist.get_world_size() - 1)
        return box[0] | {"optimizer/grad_norm": result.grad_norm, "optimizer/lr": result.lr}


def average(results: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over the optimizer steps that report it."""
    values = {name: [result[name] for result in results if name in result] for result in results for name in result}
    return {name: sum(found) / len(found) for name, found in values.items()}


class _Ticker:
    """Counts micro-batches for the progress bar."""

    def __init__(self, on_progress: OnProgress, total: int) -> None:
        self._on_progress, self._total, self._done = on_progress, total, 0

    def __call__(self) -> None:
        self._on_progress(self._done, self._total)
        self._done += 1


def _split(groups: Sequence, parts: int) -> list[Sequence]:
    """Contiguous parts whose sizes differ by at most one."""
    borders = [len(groups) * i // parts for i in range(parts + 1)]
    return [groups[start:end] for start, end in zip(borders, borders[1:], strict=False)]
