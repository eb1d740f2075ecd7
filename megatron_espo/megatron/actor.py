"""The trained policy of a run: Megatron's model, updated from rollouts."""

import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_espo.config import Config, Megatron
from megatron_espo.data.packing import MicroBatch, PackingSpec, TrainSequence, batch_totals, pack
from megatron_espo.distributed.runtime import Runtime
from megatron_espo.errors import InputError
from megatron_espo.megatron import consistency
from megatron_espo.megatron.checkpoint import Save, load_checkpoint, save_checkpoint, save_strategy
from megatron_espo.megatron.expert_load import ExpertLoad
from megatron_espo.megatron.forward_step import make_forward_step
from megatron_espo.megatron.guards import oom_hint
from megatron_espo.megatron.loss import Recorder
from megatron_espo.megatron.model import build_configured, use_transformer_engine
from megatron_espo.megatron.offload import Offloader
from megatron_espo.megatron.reference import ReferencePolicy
from megatron_espo.megatron.router_replay import RouterReplay
from megatron_espo.megatron.scatter import scatter_sequences
from megatron_espo.megatron.train_engine import Tick, TrainEngine
from megatron_espo.models.spec import ModelSpec
from megatron_espo.monitoring.metrics import average_steps, reduce_metrics_everywhere
from megatron_espo.monitoring.progress import OnProgress
from megatron_espo.weights.hf_io import load_hf_weights

# A run ends after so many skipped optimizer steps in a row.
MAX_SKIPPED = 3
# Optimizer steps between comparisons of the weights that ranks share.
CHECK_WEIGHTS_EVERY = 10

Groups = Sequence[Sequence[TrainSequence]]
# Prompt token ids, response token ids, and the engine's experts (``TrainSequence.routed_experts``).
Scored = tuple[Sequence[int], Sequence[int], np.ndarray | None]


def build_chunks(config: Config, spec: ModelSpec, runtime: Runtime) -> list[torch.nn.Module]:
    """Build this rank's model chunks with the weights of ``model.path``. Zero collectives."""
    chunks = build_configured(config, spec, runtime.groups)
    load_hf_weights(chunks, spec, config.model.path, runtime.groups)
    return chunks


def packing_spec(megatron: Megatron, groups: Any) -> PackingSpec:
    """Return the specification for :func:`megatron_espo.data.packing.pack` for a layout.

    Args:
        megatron: the ``megatron`` section of the configuration.
        groups: Megatron's ``ProcessGroupCollection``.
    """
    # 8-bit matrix products need multiples of the hardware's tiles on every rank.
    tokens = (32 if megatron.fp8_recipe == "mxfp8" else 16) if megatron.fp8 else 1
    is_interleaved = megatron.virtual_pipeline_model_parallel_size is not None
    # Transformer Engine's attention does not support shared prompts.
    is_local = not use_transformer_engine(megatron.transformer_impl)
    return PackingSpec(
        data_parallel_rank=groups.dp.rank(),
        data_parallel_size=groups.dp.size(),
        context_parallel_rank=groups.cp.rank(),
        context_parallel_size=groups.cp.size(),
        max_tokens=megatron.max_tokens_per_micro_batch,
        max_sequences=megatron.micro_batch_size,
        multiple_of=tokens * (groups.tp.size() if megatron.sequence_parallel else 1),
        count_multiple_of=groups.pp.size() if is_interleaved else 1,
        share_prompts=is_local and megatron.packed and groups.cp.size() == 1,
        padded=not megatron.packed,
        uniform=groups.pp.size() > 1,
    )


class BadGradients(RuntimeError):
    """Several optimizer steps in a row were skipped because of their gradients."""


class Actor:
    """Megatron's model, DDP, optimizer and schedule, driven by the objective.

    Args:
        config: the run's configuration.
        spec: the model.
        runtime: this rank's process groups.
        record: see :func:`megatron_espo.megatron.forward_step.make_forward_step`.

    Attributes:
        offloader: moves parts of the state to the host. All methods need the whole state on the
            device, except :meth:`score`, which needs the weights only.
    """

    def __init__(
        self, config: Config, spec: ModelSpec, runtime: Runtime, record: Recorder | None = None
    ) -> None:
        self.config, self.spec, self.groups = config, spec, runtime.groups
        algorithm = config.algorithm
        self.updates_per_step = algorithm.num_epochs * algorithm.num_mini_batches
        self.chunks = build_chunks(config, spec, runtime)
        total_steps, overrides = config.run.steps * self.updates_per_step, config.megatron.overrides
        options = (config.optimizer, total_steps, overrides, self.updates_per_step)
        self.train_engine = TrainEngine(self.chunks, self.groups, *options)
        self.offloader = Offloader(self.train_engine, config.megatron.offload)
        self._router_replay = None
        if config.rollout.router_replay and spec.experts is not None:
            self._router_replay = RouterReplay(self.chunks, spec.experts, self.groups.tp)
        budget = config.megatron.head_memory_mib
        self._forward_step = make_forward_step(
            algorithm,
            groups=self.groups,
            vocab_size=spec.vocab_size,
            temperature=config.rollout.temperature,
            max_response_tokens=config.rollout.max_response_tokens,
            head_budget_bytes=budget and budget << 20,
            record=record,
            router_replay=self._router_replay,
        )
        self.skipped_in_a_row = self._updates = 0
        self._save_strategy = save_strategy()
        self._expert_load = ExpertLoad(self.chunks, spec)
        self.reference = ReferencePolicy(self.chunks) if algorithm.kl_coef else None

    def update(self, groups: Groups, on_progress: OnProgress) -> dict[str, float]:
        """Train on one rollout batch: ``num_epochs`` passes over ``num_mini_batches`` steps.

        With several optimizer steps the old policy's log-probs and entropies are computed before
        the first. The responses of the first step need no scoring pass, unless a later pass trains
        them again: the policy is still the old policy, and the gradient is the same.

        Args:
            groups: responses by prompt, the same on every rank, except that ids, log-probs,
                sampling masks and routed experts count on rank 0 only.
            on_progress: called with (micro-batches done, all micro-batches).

        Returns:
            The step's metrics on every rank, averaged over its optimizer steps. Collective over all
            ranks.
        """
        with oom_hint(self.config.megatron, self.config.optimizer):
            return self._update(groups, on_progress)

    def _update(self, groups: Groups, on_progress: OnProgress) -> dict[str, float]:
        assert not self.offloader.offloaded, self.offloader.offloaded
        epochs, count = self.config.algorithm.num_epochs, self.config.algorithm.num_mini_batches
        # Contiguous parts whose sizes differ by at most one.
        ends = [len(groups) * i // count for i in range(count + 1)]
        parts = [
            list(itertools.chain(*groups[start:end])) for start, end in itertools.pairwise(ends)
        ]
        mini_batches = [self._pack(part) for part in parts]
        self._compare_ranks(parts, mini_batches)
        unscored = 1 if epochs == 1 else 0
        passes = epochs + 1 + (self.reference is not None)
        total = passes * sum(map(len, mini_batches)) - sum(map(len, mini_batches[:unscored]))
        done = itertools.count()

        def tick() -> None:
            on_progress(next(done), total)

        began = time.perf_counter()
        names = ("old_logprob", "old_entropy")
        scored = [self._score(batches, tick, *names) for batches in mini_batches[unscored:]]
        mini_batches = mini_batches[:unscored] + scored
        if self.reference is not None:
            with self.reference.swapped_in():
                name = "reference_logprob"
                mini_batches = [self._score(batches, tick, name) for batches in mini_batches]
        torch.cuda.synchronize()
        score_s = time.perf_counter() - began
        steps = [
            self._step(batches, part, tick)
            for _ in range(epochs)
            for batches, part in zip(mini_batches, parts, strict=True)
        ]
        self.train_engine.gather_weights()
        tokens = epochs * sum(batches[0].totals.num_tokens for batches in mini_batches)
        metrics = average_steps(steps) | {"train/tokens": float(tokens)} | self._expert_load.pop()
        if self.updates_per_step > 1 or self.reference is not None:
            metrics |= {"time/score_s": score_s}
        return metrics | (self._router_replay.pop() if self._router_replay else {})

    def _step(
        self, batches: list[MicroBatch], responses: Sequence[TrainSequence], tick: Tick
    ) -> dict[str, float]:
        """Take one optimizer step. If it is skipped, write its responses to a file.

        Raises:
            BadGradients: ``MAX_SKIPPED`` steps in a row were skipped.
        """
        result = self.train_engine.step(self._forward_step, batches, tick)
        consistency.check_norms(result.grad_norm)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        if result.skipped:
            name = f"{time.strftime('%Y%m%d-%H%M%S')}-{self.skipped_in_a_row}.json"
            path = Path(self.config.run.dir, "bad_batches", name)
            what = f"gradient: {result.skipped}; no step taken, batch in {path}"
            if dist.get_rank() == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                bare = [replace(s, routed_experts=None, sampling_mask=None) for s in responses]
                text = json.dumps([asdict(s) for s in bare], default=np.ndarray.tolist)
                path.write_text(text, encoding="utf-8")
                print(f"warning: {what}", flush=True)
            if self.skipped_in_a_row == MAX_SKIPPED:
                raise BadGradients(
                    f"{what}; {MAX_SKIPPED} in a row: lower optimizer.lr, or look for bad data in "
                    "the batch"
                )
        metrics = reduce_metrics_everywhere(result.metrics, self.groups.dp_cp)
        return metrics | {
            "optimizer/grad_norm": result.grad_norm,
            "optimizer/lr": result.lr,
            "optimizer/skipped": float(bool(result.skipped)),
        }

    def save(self, out: str | Path, state: dict[str, Any]) -> Save:
        """Start to write model, optimizer, schedule and ``state`` (JSON values). Collective.

        See :func:`save_checkpoint`.
        """
        assert not self.offloader.offloaded, self.offloader.offloaded
        engine = self.train_engine
        state = state | {
            "scheduler": engine.scheduler.state_dict(),
            "skipped_in_a_row": self.skipped_in_a_row,
            "grad_norms": list(engine.spikes.norms),
        }
        options = {"optimizer": engine.optimizer, "state": state, "strategy": self._save_strategy}
        return save_checkpoint(self.chunks, self.spec, out, **options)

    def load(self, path: str | Path) -> dict[str, Any]:
        """Load what :meth:`save` wrote in any layout, and return the ``state``. Collective."""
        engine = self.train_engine
        state = load_checkpoint(self.chunks, self.spec, path, optimizer=engine.optimizer)
        schedule = state.pop("scheduler")
        then, now = schedule["lr_decay_steps"], engine.scheduler.lr_decay_steps
        style = self.config.optimizer.lr_decay_style
        if then != now and style != "constant" and dist.get_rank() == 0:
            change = f"the {style} schedule of the learning rate has {now} steps, it had {then}"
            print(f"warning: {change} when {path} was saved", flush=True)
        engine.scheduler.load_state_dict(schedule)
        self.skipped_in_a_row = state.pop("skipped_in_a_row", 0)
        engine.spikes.norms.extend(state.pop("grad_norms", []))
        return state

    def score(self, responses: Sequence[Scored]) -> list[list[float]]:
        """Return the log-probs (nats, at the run's temperature) of each response given its prompt.

        Every data-parallel replica computes all of them, in one micro-batch. Collective over all
        ranks: one forward pass through Megatron's schedule, one all-reduce under context
        parallelism, and one broadcast of objects from the last rank.

        Args:
            responses: the same on every rank.

        Returns:
            The same lists on every rank.
        """
        assert "weights" not in self.offloader.offloaded
        sequences = []
        for number, (prompt, response, experts) in enumerate(responses):
            values = (np.asarray(prompt), np.asarray(response), np.zeros(len(response)), 0.0)
            # ``pack`` changes the order; the micro-batch keeps the numbers.
            sequence = TrainSequence(*values, logged_sample=number, routed_experts=experts)
            sequences.append(sequence)
        tokens = sum(sequence.num_trained for sequence in sequences)
        totals = batch_totals(sequences, num_responses=len(sequences), num_response_tokens=tokens)
        spec = replace(
            packing_spec(self.config.megatron, self.groups),
            data_parallel_rank=0,
            data_parallel_size=1,
            max_tokens=sys.maxsize,
            max_sequences=None,
            share_prompts=False,
        )
        batches = pack(sequences, totals, spec)
        order, lengths = batches[0].logged_sample, batches[0].lengths.tolist()
        with self._expert_load.paused():
            scored = self.train_engine.score(self._forward_step, batches)
        box: list[Any] = [None]
        if scored:
            logprob, local = scored[0][0], batches[0].local_tokens
            if local is not None:
                whole = logprob.new_zeros(sum(lengths))
                logprob = whole.index_copy_(0, local.to(logprob.device), logprob)
                dist.all_reduce(logprob, group=self.groups.cp)
            box = [[part.tolist() for part in logprob.split(lengths)]]
        dist.broadcast_object_list(box, src=dist.get_world_size() - 1)
        return [logprobs for _, logprobs in sorted(zip(order, box[0], strict=True))]

    def _compare_ranks(self, parts: Groups, mini_batches: Sequence[list[MicroBatch]]) -> None:
        """Raise RankMismatch on every rank if ranks have different data or weights. Collective."""
        if dist.get_world_size() == 1:
            return
        sequences, batches = itertools.chain(*parts), itertools.chain(*mini_batches)
        own = consistency.data_fingerprints(sequences, batches, self.groups)
        consistency.check_fingerprints(own)
        if self._updates % CHECK_WEIGHTS_EVERY == 0:
            consistency.check_weights(self.chunks, self.groups)
        self._updates += 1

    def _pack(self, sequences: Sequence[TrainSequence]) -> list[MicroBatch]:
        """Return this data-parallel rank's micro-batches of one optimizer step.

        Collective; see :func:`scatter_sequences`.

        Raises:
            InputError: on rank 0, rollouts that do not match ``rollout.top_p`` and ``top_k``.
            ValueError: on rank 0, responses without routed experts.
        """
        # Responses without advantage have no gradient from the objective: they count in the
        # denominators only.
        regularized = self.config.algorithm.kl_coef or self.config.algorithm.entropy_coef
        kept = [s for s in sequences if not s.masked and (s.advantage or regularized)]
        truncates = self.config.rollout.truncates
        if dist.get_rank() == 0:
            if any((s.sampling_mask is None) is truncates for s in kept):
                expected, got = ("masks", "none") if truncates else ("no masks", "some")
                raise InputError(
                    f"rollouts: expected {expected} of top-p and top-k, because of rollout.top_p "
                    f"and rollout.top_k, got {got}; use the settings with which they were sampled, "
                    "and environments that keep Generation.sampling_mask"
                )
            missing = sum(s.routed_experts is None for s in kept)
            if self._router_replay and missing:
                raise ValueError(
                    "router replay: expected routed_experts of every response, got none of "
                    f"{missing} of {len(kept)}"
                )
        tokens = sum(sequence.num_trained for sequence in sequences)
        totals = batch_totals(kept, num_responses=len(sequences), num_response_tokens=tokens)
        spec = packing_spec(self.config.megatron, self.groups)
        if dist.get_world_size() > 1:
            kept = scatter_sequences(kept, self.groups, spec.share_prompts)
        return pack(kept, totals, spec)

    def _score(self, batches: list[MicroBatch], tick: Tick, *names: str) -> list[MicroBatch]:
        """Store the model's log-probs (and entropies) as ``names``, on the last pipeline stage."""
        scored = self.train_engine.score(self._forward_step, batches, tick)
        if not scored:
            return batches
        fields = (dict(zip(names, values, strict=False)) for values in scored)
        return [replace(batch, **new) for batch, new in zip(batches, fields, strict=True)]
