"""The trained policy of a run: builds Megatron's model from the configuration and updates it from rollouts."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_espo.config import Config
from megatron_espo.config.experts import read_experts, replays_router
from megatron_espo.data.packing import MicroBatch, TrainSequence, batch_totals, pack
from megatron_espo.mcore.agreement import data_claims, refuse_disagreement, refuse_other_norms, refuse_other_weights
from megatron_espo.mcore.canary import Scored, score_responses
from megatron_espo.mcore.checkpoint import load_checkpoint, save_checkpoint
from megatron_espo.mcore.expert_load import ExpertLoad
from megatron_espo.mcore.forward_step import make_forward_step
from megatron_espo.mcore.guards import naming_the_knob
from megatron_espo.mcore.loss import Observe
from megatron_espo.mcore.model import build_configured, use_transformer_engine
from megatron_espo.mcore.offload import Offloader
from megatron_espo.mcore.optimizer import Policy
from megatron_espo.mcore.reference import ReferencePolicy
from megatron_espo.mcore.router_replay import RouterReplay, scatter_routed_experts
from megatron_espo.mcore.runtime import Runtime
from megatron_espo.metrics import average_steps, reduce_metrics_everywhere
from megatron_espo.progress import OnProgress
from megatron_espo.weights.hf_io import load_hf_weights


def build_chunks(config: Config, hf_config: dict[str, Any], runtime: Runtime) -> list[torch.nn.Module]:
    """This rank's model chunks in the configured layout, with the weights of ``model.path``. Zero collectives."""
    chunks = build_configured(config, hf_config, runtime.groups)
    load_hf_weights(chunks, hf_config, config.model.path, runtime.groups)
    return chunks


def packing_options(megatron, groups) -> dict[str, Any]:
    """How :func:`megatron_espo.data.packing.pack` must cut micro-batches for a layout.

    Args:
        megatron: the ``megatron`` section of the configuration.
        groups: Megatron's ``ProcessGroupCollection``.
    """
    interleaved = megatron.virtual_pipeline_model_parallel_size is not None
    # Transformer Engine's attention knows no branches.
    branches = not use_transformer_engine(megatron.transformer_impl)
    return {
        "data_parallel_rank": groups.dp.rank(),
        "data_parallel_size": groups.dp.size(),
        "context_parallel_rank": groups.cp.rank(),
        "context_parallel_size": groups.cp.size(),
        "max_tokens": megatron.max_tokens_per_micro_batch,
        "max_sequences": megatron.micro_batch_size,
        "multiple_of": _token_multiple(megatron.fp8, megatron.fp8_recipe) * (groups.tp.size() if megatron.sequence_parallel else 1),
        "count_multiple_of": groups.pp.size() if interleaved else 1,
        "share_prompts": branches and megatron.packed and groups.cp.size() == 1,
        "padded": not megatron.packed,
        "uniform": groups.pp.size() > 1,
    }


def _token_multiple(fp8: str | None, recipe: str) -> int:
    """What the number of tokens must divide by in a matrix product: each side, where it has 8 bits, by the size of the hardware's tiles."""
    if not fp8:
        return 1
    return 32 if recipe == "mxfp8" else 16


# Optimizer steps in a row whose gradient is not used before the run ends.
MOST_SKIPPED = 3


class BadGradients(RuntimeError):
    """Several gradients in a row were not finite, or spikes; none was used."""


class Learner:
    """Megatron's model, DDP, optimizer and schedule, and the objective that drives them.

    Args:
        config: the run's configuration.
        hf_config: the model's ``config.json``.
        runtime: this rank's place.
        observe: see :func:`megatron_espo.mcore.forward_step.make_forward_step`.

    Attributes:
        offloader: moves parts of its state to the host and back (``megatron.offload``); everything here needs them back, but for
            :meth:`score`, which needs the weights alone.
    """

    def __init__(self, config: Config, hf_config: dict[str, Any], runtime: Runtime, observe: Observe | None = None) -> None:
        self.config, self.hf_config, self.groups = config, hf_config, runtime.groups
        self.updates_per_step = config.algorithm.num_epochs * config.algorithm.num_mini_batches
        self.chunks = build_chunks(config, hf_config, runtime)
        self.policy = Policy(self.chunks, runtime.groups, config.optimizer, config.run.steps * self.updates_per_step)
        self.offloader = Offloader(self.policy, config.megatron.offload)
        self._experts = read_experts(hf_config)
        replays = replays_router(config.rollout, hf_config)
        self._router_replay = RouterReplay(self.chunks, self._experts, runtime.groups.tp) if replays else None
        budget = config.megatron.head_memory_mib
        self._forward_step = make_forward_step(
            config.algorithm,
            groups=runtime.groups,
            vocab_size=hf_config["vocab_size"],
            temperature=config.rollout.temperature,
            max_response_tokens=config.rollout.max_response_tokens,
            head_budget_bytes=budget and budget << 20,
            observe=observe,
            router_replay=self._router_replay,
        )
        self.skipped_in_a_row = self._updates = 0
        self._expert_load = ExpertLoad(self.chunks, hf_config)
        self.reference = ReferencePolicy(self.chunks) if config.algorithm.kl_coef else None

    def update(self, groups: Sequence[Sequence[TrainSequence]], on_progress: OnProgress) -> dict[str, float]:
        """Train on one rollout batch: ``num_epochs`` passes over ``num_mini_batches`` optimizer steps.

        The old policy's log-probs and entropy groups are computed before the first of several optimizer steps. With exactly one there is no
        scoring pass: the policy is the old policy then, and the gradient is the same.

        Args:
            groups: responses by prompt, the same on every rank; with router replay rank 0 has their routed experts.

        Returns:
            The step's metrics on every rank, averaged over its optimizer steps. Collective over all ranks.
        """
        with naming_the_knob(self.config.megatron, self.config.optimizer):
            return self._update(groups, on_progress)

    def _update(self, groups: Sequence[Sequence[TrainSequence]], on_progress: OnProgress) -> dict[str, float]:
        assert not self.offloader.away, self.offloader.away
        parts = _split(groups, self.config.algorithm.num_mini_batches)
        mini_batches = [self._pack(part) for part in parts]
        self._compare_ranks(groups, mini_batches)
        count = sum(map(len, mini_batches))
        scores_old, scores_reference = self.updates_per_step > 1, self.reference is not None
        tick = _Ticker(on_progress, count * (self.config.algorithm.num_epochs + scores_old + scores_reference))
        if scores_old:
            mini_batches = [self._score(batches, tick, "old_logprob", "old_entropy") for batches in mini_batches]
        if scores_reference:
            with self.reference.lent():
                mini_batches = [self._score(batches, tick, "reference_logprob") for batches in mini_batches]
        results = [
            self._step(batches, part, tick)
            for _ in range(self.config.algorithm.num_epochs)
            for batches, part in zip(mini_batches, parts, strict=True)
        ]
        trained = sum(batches[0].totals.num_tokens for batches in mini_batches) * self.config.algorithm.num_epochs
        replayed = self._router_replay.take() if self._router_replay else {}
        return average_steps(results) | {"train/tokens": float(trained)} | self._expert_load.take() | replayed

    def _step(self, batches: list[MicroBatch], part: Sequence[Sequence[TrainSequence]], tick: "_Ticker") -> dict[str, float]:
        """One optimizer step, skipped if its gradient is refused; ``MOST_SKIPPED`` in a row end the run. The batch is written down."""
        result = self.policy.step(self._forward_step, batches, tick)
        refuse_other_norms(result.grad_norm)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.refused else 0
        if result.refused:
            path = Path(self.config.run.dir, "bad_batches", f"{time.strftime('%Y%m%d-%H%M%S')}-{self.skipped_in_a_row}.json")
            what = f"gradient: {result.refused}; no step taken, batch in {path}"
            if dist.get_rank() == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                content = [asdict(replace(sequence, routed_experts=None)) for group in part for sequence in group]
                path.write_text(json.dumps(content, default=np.ndarray.tolist))
                print(f"warning: {what}", flush=True)
            if self.skipped_in_a_row == MOST_SKIPPED:
                raise BadGradients(f"{what}; {MOST_SKIPPED} in a row: lower optimizer.lr, or look for bad data in the batch")
        metrics = reduce_metrics_everywhere(result.metrics, self.groups.dp_cp)
        optimizer = {"grad_norm": result.grad_norm, "lr": result.lr, "skipped": float(bool(result.refused))}
        return metrics | {f"optimizer/{name}": value for name, value in optimizer.items()}

    def save(self, out: str | Path, state: dict[str, Any]) -> None:
        """Write model, optimizer, learning-rate schedule and ``state`` (JSON values); see :func:`save_checkpoint`. Collective."""
        assert not self.offloader.away, self.offloader.away
        state = state | {"scheduler": self.policy.scheduler.state_dict()}
        state |= {"skipped_in_a_row": self.skipped_in_a_row, "grad_norms": list(self.policy.spikes.norms)}
        save_checkpoint(self.chunks, self.hf_config, out, optimizer=self.policy.optimizer, state=state)

    def load(self, path: str | Path) -> dict[str, Any]:
        """Continue from what :meth:`save` wrote, in this or another layout; returns the ``state``. Collective."""
        state = load_checkpoint(self.chunks, self.hf_config, path, optimizer=self.policy.optimizer)
        self.policy.scheduler.load_state_dict(state.pop("scheduler"))
        self.skipped_in_a_row = state.pop("skipped_in_a_row", 0)
        self.policy.spikes.norms.extend(state.pop("grad_norms", []))
        return state

    def score(self, responses: Sequence[Scored]) -> list[list[float]]:
        """Log-probs of each response's tokens given its prompt, on every rank; see ``canary.score_responses``."""
        assert "weights" not in self.offloader.away
        with self._expert_load.paused():
            return score_responses(self.policy, self._forward_step, responses, packing_options(self.config.megatron, self.groups))

    def _compare_ranks(self, groups: Sequence[Sequence[TrainSequence]], mini_batches: Sequence[list[MicroBatch]]) -> None:
        """Disagreement, on every rank, where ranks would train on different data or hold different weights. Collective."""
        every = self.config.run.agree_every
        refuse_disagreement(data_claims([s for group in groups for s in group], [b for batches in mini_batches for b in batches], self.groups))
        if every and self._updates % every == 0 and dist.get_world_size() > 1:
            refuse_other_weights(self.chunks, self.groups)
        self._updates += 1

    def _pack(self, groups: Sequence[Sequence[TrainSequence]]) -> list[MicroBatch]:
        """This data-parallel rank's micro-batches of one optimizer step."""
        sequences = [sequence for group in groups for sequence in group]
        # Without advantage the objective has no gradient: such responses count in the denominators and cost nothing.
        regularized = self.config.algorithm.kl_coef or self.config.algorithm.entropy_coef
        kept = [s for s in sequences if not s.masked and (s.advantage or regularized)]
        tokens = sum(sequence.num_trained for sequence in sequences)
        totals = batch_totals(kept, num_responses=len(sequences), num_response_tokens=tokens)
        options = packing_options(self.config.megatron, self.groups)
        if self._router_replay:
            kept = scatter_routed_experts(kept, self._experts, self.groups, options["share_prompts"])
        return pack(kept, totals, **options)

    def _score(self, batches: list[MicroBatch], tick: "_Ticker", *names: str) -> list[MicroBatch]:
        """Attach the model's log-probs (and entropies) under ``names``, on the last pipeline stage, where the loss is."""
        scored = self.policy.score(self._forward_step, batches, tick)
        if not scored:
            return batches
        return [
            replace(batch, **dict(zip(names, values, strict=False)))
            for batch, values in zip(batches, scored, strict=True)
        ]


class _Ticker:
    """Counts micro-batches for the progress bar."""

    def __init__(self, on_progress: OnProgress, total: int) -> None:
        self._on_progress, self._total, self._done = on_progress, total, 0

    def __call__(self) -> None:
        self._on_progress(self._done, self._total)
        self._done += 1


def _split(groups: Sequence, parts: int) -> list[Sequence]:
    """Contiguous parts whose sizes differ by at most one."""
    boundaries = [len(groups) * i // parts for i in range(parts + 1)]
    return [groups[start:end] for start, end in zip(boundaries, boundaries[1:], strict=False)]
