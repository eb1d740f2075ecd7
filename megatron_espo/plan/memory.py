"""Bytes on one GPU of each pipeline stage, at the worst moment of each phase of a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from megatron_espo.mcore.meta import BuiltRank
from megatron_espo.numerics.plan import plan_head
from megatron_espo.plan.activations import Sharding, layer_sizes, norm_bytes, stack_bytes
from megatron_espo.plan.engine import Engine
from megatron_espo.plan.pipeline import Pipeline
from megatron_espo.weights.families import Mapping


@dataclass(frozen=True)
class StageMemory:
    """One GPU of a pipeline stage, in bytes.

    Attributes:
        weights, gradients, main_weights, adam: what it holds between steps; read off the built model and optimizer.
        activations: kept for backward by all micro-batches in flight.
        working: recomputed activations and gradients of one chunk, for the moment.
        head: final norm, logits and their gradient (last stage).
        sync: extra while weights are gathered for the engine, when there are no activations.
        engine: the share of an engine on the same GPU.
        engine_weights: the part of it that holds weights.
        sleeps: whether that engine holds nothing during training, and nothing but weights during the sync (``rollout.sleep``).
        offload: what of the trainer's lies on the host then (``megatron.offload``).
        canary: whether engine and trainer compute log-probs of the same weights after a sync.
    """

    stage: int
    in_flight: int
    weights: int
    gradients: int
    main_weights: int
    adam: int
    activations: int
    working: int
    head: int
    sync: int
    engine: int
    engine_weights: int
    sleeps: bool
    offload: tuple[str, ...]
    canary: bool

    @property
    def static(self) -> int:
        return self.weights + self.gradients + self.main_weights + self.adam

    @property
    def host(self) -> int:
        """Host memory for what leaves the GPU; gradients are not copied."""
        return self._copied("optimizer", "weights")

    @property
    def phases(self) -> dict[str, tuple[int, int]]:
        """What trainer and engine take in each phase of a step."""
        kept = self.static - self._copied("optimizer") - ("gradients" in self.offload) * self.gradients
        phases = {
            "training": (self.static + self.activations + max(self.working, self.head), 0 if self.sleeps else self.engine),
            "sync": (kept + self.sync, self.engine_weights if self.sleeps else self.engine),
            "canary": (kept, self.engine),  # the engine decodes, and the trainer needs its weights for the same tokens' log-probs
            "rollouts": (kept - self._copied("weights"), self.engine),
        }
        return phases if self.canary else {name: bytes_ for name, bytes_ in phases.items() if name != "canary"}

    @property
    def total(self) -> int:
        """Trainer and engine in the worst phase."""
        return max(map(sum, self.phases.values()))

    def _copied(self, *parts: str) -> int:
        sizes = {"optimizer": self.main_weights + self.adam, "weights": self.weights}
        return sum(size for part, size in sizes.items() if part in parts and part in self.offload)


def plan_memory(
    rank: BuiltRank,
    config: Any,
    hf_config: dict[str, Any],
    groups: Sequence[Sequence[Mapping]],
    pipeline: Pipeline,
    *,
    on_gpu: bool,
    sync: int,
    engine: Engine | None,
) -> StageMemory:
    """Memory of one GPU that holds what ``rank`` holds.

    Args:
        groups: of ``families.model_groups``.
        on_gpu: a GPU with Transformer Engine where the configuration leaves it open; else a CPU.
        sync: extra bytes while weights are gathered.
        engine: that on the same GPU, if there is one.
    """
    megatron = config.megatron
    how = sharding(config, pipeline, on_gpu)
    layers = sorted({held.group for held in rank.held} - {0, len(groups) - 1})
    sizes = [layer_sizes(groups[index], hf_config) for index in layers]
    per_chunk = max(1, len(sizes) // pipeline.chunks)
    chunks = [sizes[start : start + per_chunk] for start in range(0, len(sizes), per_chunk)]
    stacks = [stack_bytes(chunk, how, megatron.recompute_method, megatron.recompute_num_layers) for chunk in chunks]
    in_flight = pipeline.in_flight(rank.stage)
    kept = max((stack.kept_bytes for stack in stacks), default=0)
    is_last = rank.stage == pipeline.stages - 1
    if not is_last:  # the stage's output waits there until its gradient comes back
        kept += int(hf_config["hidden_size"] * how.itemsize * how.tokens / how.sp)
    working = max((stack.backward_bytes for stack in stacks), default=0)
    if not how.transformer_engine:  # a linear's gradient is a tensor of its own before it is added to DDP's buffer
        working += max(prod(held.shape) for held in rank.held if 0 < held.group < len(groups) - 1) * how.itemsize
    return StageMemory(
        stage=rank.stage,
        in_flight=in_flight,
        weights=rank.parameter_bytes,
        gradients=rank.gradient_bytes,
        main_weights=rank.main_bytes,
        adam=rank.adam_bytes,
        activations=in_flight * kept,
        working=working,
        head=head_bytes(hf_config, how, megatron.head_memory_mib, on_gpu) if is_last else 0,
        sync=sync,
        engine=engine.budget_bytes if engine else 0,
        engine_weights=engine.weight_bytes if engine else 0,
        sleeps=config.rollout.sleep,
        offload=megatron.offload,
        canary=bool(config.rollout.canary_prompts),
    )


def sharding(config: Any, pipeline: Pipeline, on_gpu: bool) -> Sharding:
    """How activations are cut and kept."""
    megatron = config.megatron
    tp = megatron.tensor_model_parallel_size
    auto = on_gpu if megatron.transformer_impl == "auto" else megatron.transformer_impl == "transformer_engine"
    return Sharding(
        tokens=-(-pipeline.tokens // megatron.context_parallel_size),
        itemsize=getattr(torch, config.model.dtype).itemsize,
        tp=tp,
        cp=megatron.context_parallel_size,
        expert_tp=megatron.expert_tensor_parallel_size or tp,
        sequence_parallel=megatron.sequence_parallel,
        transformer_engine=auto,
        granularity=megatron.recompute_granularity,
    )


def head_bytes(hf_config: dict[str, Any], how: Sharding, budget_mib: int | None, on_gpu: bool) -> int:
    """Final norm and fused output layer with every token scored: the plan that ``numerics`` makes, and what that leaves out."""
    hidden = hf_config["hidden_size"]
    columns = -(-hf_config["vocab_size"] // how.tp)
    dtype = {2: torch.bfloat16, 4: torch.float32}[how.itemsize]
    logits = plan_head(
        how.tokens,
        columns,
        dtype=dtype,
        budget_bytes=None if budget_mib is None else budget_mib << 20,
        float32_logits=True,
        convert_gradient=not on_gpu and how.itemsize < 4,
    )
    # Scored rows, their gradient, and the gradient of all rows twice: before and after it is summed over the ranks.
    rows = 4 * hidden * how.itemsize * how.tokens
    stand_in = columns * hidden * how.itemsize  # autograd wants a gradient of the weight, although DDP's buffer has it
    return int(logits.training_bytes + rows + stand_in + norm_bytes(hidden, how) * how.tokens)
