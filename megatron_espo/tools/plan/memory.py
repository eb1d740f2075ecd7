"""Bytes on one GPU of each pipeline stage, in every phase of a step.

Parameters and optimizer states are exact: they are read off Megatron's own model. Activations are
estimated tensor by tensor. Attention is a fused kernel (Transformer Engine, flash attention, or
torch on a CPU), so no T x T matrix is kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch

from megatron_espo.megatron.meta import BuiltRank
from megatron_espo.models.layouts import ShardLayout
from megatron_espo.models.mapping import ParamMapping
from megatron_espo.models.spec import ModelSpec
from megatron_espo.numerics.plan import plan_head

Groups = Sequence[Sequence[ParamMapping]]
GB = 10**9
FLOAT32 = 4


@dataclass(frozen=True)
class Pipeline:
    """One optimizer step of one data-parallel rank.

    Attributes:
        stages, chunks: pipeline stages, and model chunks on each (virtual pipeline stages).
        tokens: of the largest micro-batch, over all its context-parallel ranks.
        expected_tokens: assumed mean length of a prompt with its response.
        micro_batches: of a step, at that length.
        bubble: idle share of a stage's time, (PP - 1) / (VPP x micro-batches + PP - 1).
    """

    stages: int
    chunks: int
    tokens: int
    expected_tokens: int
    micro_batches: int
    bubble: float

    def in_flight(self, stage: int) -> int:
        """Chunks of micro-batches that a stage keeps at once: 1F1B, or interleaved 1F1B."""
        if self.chunks == 1:
            return min(self.stages - stage, self.micro_batches)
        warm_up = 2 * (self.stages - stage - 1) + (self.chunks - 1) * self.stages
        return min(warm_up + 1, self.chunks * self.micro_batches)


def plan_pipeline(
    config: Any, spec: ModelSpec, data_parallel_size: int, expected_tokens: int | None
) -> Pipeline:
    """Count the micro-batches of ``data.packing`` if every response has the expected length.

    Args:
        expected_tokens: mean tokens of a prompt with its response; None: half of
            ``rollout.max_response_tokens``.
    """
    megatron, rollout = config.megatron, config.rollout
    longest = rollout.max_model_len or spec.max_position_embeddings
    expected = min(expected_tokens or max(1, rollout.max_response_tokens // 2), longest)
    capacity = megatron.max_tokens_per_micro_batch
    largest = largest_micro_batch(capacity, rollout)
    each = max(1, capacity // expected)
    if megatron.micro_batch_size:
        each = min(each, megatron.micro_batch_size)
        largest = min(largest, megatron.micro_batch_size * longest)
    responses = rollout.prompts_per_step * rollout.group_size
    count = ceil(ceil(responses / config.algorithm.num_mini_batches / data_parallel_size) / each)
    stages = megatron.pipeline_model_parallel_size
    chunks = megatron.virtual_pipeline_model_parallel_size or 1
    if chunks > 1:  # the interleaved schedule needs a multiple of the number of stages
        count = ceil(count / stages) * stages
    bubble = (stages - 1) / (chunks * count + stages - 1)
    return Pipeline(stages, chunks, largest, expected, count, bubble)


def largest_micro_batch(capacity: int, rollout: Any) -> int:
    """Tokens of the largest micro-batch: a sequence longer than ``capacity`` has one to itself.

    Prompts are not counted where ``rollout.max_model_len`` does not limit them.
    """
    return max(capacity, rollout.max_model_len or rollout.max_response_tokens)


@dataclass(frozen=True)
class Engine:
    """One vLLM engine, per GPU; all engines are alike.

    Attributes:
        number: of engines.
        gpus: GPUs of an engine (``rollout.tensor_parallel_size``).
        shares_gpus: whether the trainer uses the same GPUs: those of the engine's owner and of the
            next ranks.
        budget_bytes: vLLM's memory, ``rollout.gpu_memory_utilization`` of the GPU.
        weight_bytes: the model's weights.
        kv_bytes_per_token: keys and values of one token.
        kv_tokens: tokens that fit beside the weights; vLLM's workspace is not subtracted.
        max_model_len: longest prompt and response.
    """

    number: int
    gpus: int
    shares_gpus: bool
    budget_bytes: int
    weight_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int
    max_model_len: int

    def problems(self) -> Iterator[str]:
        """Reasons why vLLM would not start."""
        if self.weight_bytes > self.budget_bytes:
            yield (
                f"the engine's weights take {self.weight_bytes / GB:.1f} GB on each of its "
                f"{self.gpus} GPUs, its share (rollout.gpu_memory_utilization) is "
                f"{self.budget_bytes / GB:.1f} GB"
            )
        elif self.kv_tokens < self.max_model_len:
            yield (
                f"the engine's cache holds {self.kv_tokens:,} tokens, one sequence may have "
                f"{self.max_model_len:,} (rollout.max_model_len, null: the model's context)"
            )


def plan_engine(config: Any, spec: ModelSpec, shares_gpus: bool, gpu_memory: int) -> Engine:
    """Shard the weights as vLLM does, norms whole; keys and values take the rest of its budget.

    ``rollout.quantization`` leaves one byte for each value of the layers' matrices.
    """
    rollout, gpus = config.rollout, config.rollout.tensor_parallel_size
    itemsize, weights = getattr(torch, config.model.dtype).itemsize, 0
    for i, group in enumerate(spec.groups):
        quantized = rollout.quantization and 0 < i < len(spec.groups) - 1
        for mapping in group:
            count = sum(prod(shape) for _, shape in mapping.huggingface)
            is_whole = mapping.layout is ShardLayout.REPLICATED
            each = 1 if quantized and not is_whole else itemsize
            weights += count * each if is_whole else -(-count * each // gpus)
    per_token = spec.num_hidden_layers * spec.cache_columns(gpus) * itemsize
    budget = int(rollout.gpu_memory_utilization * gpu_memory)
    return Engine(
        number=rollout.engines,
        gpus=gpus,
        shares_gpus=shares_gpus,
        budget_bytes=budget,
        weight_bytes=weights,
        kv_bytes_per_token=per_token,
        kv_tokens=max(0, budget - weights) // per_token,
        max_model_len=rollout.max_model_len or spec.max_position_embeddings,
    )


@dataclass(frozen=True)
class StageMemory:
    """One GPU of a pipeline stage, in bytes.

    Attributes:
        parameters: elements: shards, whole norms, the padding of the vocabulary.
        weights, gradients, main_weights, adam: held between steps; read off the built model and
            optimizer.
        activations: kept for backward by all micro-batches in flight.
        working: for a moment: recomputed activations and gradients in one chunk's backward pass, or
            the head's norm, logits and their gradient (last stage).
        sync: extra memory while weights are gathered for the engine; no activations exist then.
        engine: memory of an engine on the same GPU.
        host: host memory for the offloaded parts (gradients are not copied) and for the reference
            policy of ``algorithm.kl_coef``.
        phases: trainer and engine in each phase of a step.
        total: trainer and engine in the worst phase.
    """

    stage: int
    parameters: int
    in_flight: int
    weights: int
    gradients: int
    main_weights: int
    adam: int
    activations: int
    working: int
    sync: int
    engine: int
    host: int
    phases: dict[str, tuple[int, int]]
    total: int


def plan_memory(
    rank: BuiltRank, config: Any, spec: ModelSpec, pipeline: Pipeline, sync: int,
    engine: Engine | None,
) -> StageMemory:  # fmt: skip
    """Memory of one GPU of the stage of ``rank``.

    Args:
        sync: extra bytes while weights are gathered.
        engine: the engine on the same GPU, if there is one.
    """
    groups, model = spec.groups, Activations(config, spec, pipeline.tokens)
    decoder = [shard for shard in rank.held if 0 < shard.group < len(groups) - 1]
    layers = [groups[i] for i in sorted({shard.group for shard in decoder})]
    size = max(1, len(layers) // pipeline.chunks)
    chunks = [model.chunk(layers[i : i + size]) for i in range(0, len(layers), size)]
    kept, working = map(max, zip((0, 0), *chunks, strict=True))
    if not model.fused:  # a linear's gradient is a tensor before DDP's buffer takes it
        working += max(prod(shard.shape) for shard in decoder) * model.itemsize
    if rank.stage == pipeline.stages - 1:
        working = max(working, model.head())
    else:  # the stage's output is kept until its gradient arrives
        kept += int(model.hidden_bytes * model.tokens / model.sp)
    in_flight = pipeline.in_flight(rank.stage)
    activations = in_flight * kept

    states = rank.main_bytes + rank.adam_bytes
    held = rank.parameter_bytes + rank.gradient_bytes + states
    sizes = {"optimizer": states, "gradients": rank.gradient_bytes, "weights": rank.parameter_bytes}
    away = {part: bytes_ * (part in config.megatron.offload) for part, bytes_ in sizes.items()}
    left = held - away["optimizer"] - away["gradients"]
    reference = rank.parameter_bytes if config.algorithm.kl_coef else 0
    awake, weights = (engine.budget_bytes, engine.weight_bytes) if engine else (0, 0)
    sleeps = config.rollout.sleep
    phases = {
        "training": (held + activations + working, 0 if sleeps else awake),
        "sync": (left + sync, weights if sleeps else awake),
    }
    if config.rollout.canary_prompts:  # the engine decodes, and the trainer scores the same tokens
        phases["canary"] = (left, awake)
    phases["rollouts"] = (left - away["weights"], awake)
    return StageMemory(
        stage=rank.stage,
        parameters=rank.parameters,
        in_flight=in_flight,
        weights=rank.parameter_bytes,
        gradients=rank.gradient_bytes,
        main_weights=rank.main_bytes,
        adam=rank.adam_bytes,
        activations=activations,
        working=working,
        sync=sync,
        engine=awake,
        host=away["optimizer"] + away["weights"] + reference,
        phases=phases,
        total=max(map(sum, phases.values())),
    )


class Activations:
    """Estimated bytes of the activations on one rank.

    Args:
        tokens: of a micro-batch, over all its context-parallel ranks.
    """

    def __init__(self, config: Any, spec: ModelSpec, tokens: int) -> None:
        m = self.megatron = config.megatron
        self.spec, self.dtype = spec, getattr(torch, config.model.dtype)
        self.tp, self.cp = m.tensor_model_parallel_size, m.context_parallel_size
        self.sp = self.tp if m.sequence_parallel else 1  # shards of the states between linears
        self.tokens = -(-tokens // self.cp)
        self.itemsize = self.dtype.itemsize
        self.hidden_bytes = spec.hidden_size * self.itemsize
        self.fused = m.transformer_impl != "local"  # auto: Transformer Engine on a GPU

    def chunk(self, layers: Groups) -> tuple[int, int]:
        """Bytes of one micro-batch in one model chunk under the configured recomputation.

        Returns:
            Bytes kept after forward; bytes that backward adds (recomputed activations, gradients).
        """
        full, gradients = zip(*map(self._layer, layers), strict=True)
        working = max(gradients)
        if self.megatron.recompute_granularity != "full":
            return int(sum(full) * self.tokens), int(working * self.tokens)
        unit = min(self.megatron.recompute_num_layers, len(layers))
        unit_input = self.hidden_bytes / self.sp
        if self.megatron.recompute_method == "uniform":
            units = [full[start : start + unit] for start in range(0, len(layers), unit)]
            kept, again = len(units) * unit_input, max(map(sum, units))
        else:  # block: recompute each of the first layers, keep the others
            kept, again = unit * unit_input + sum(full[unit:]), max(full[:unit])
        return int(kept * self.tokens), int((again + working) * self.tokens)

    def head(self) -> int:
        """Bytes of the final norm and the fused output layer when every token is scored."""
        columns = -(-self.spec.vocab_size // self.tp)
        budget_mib = self.megatron.head_memory_mib
        logits = plan_head(
            self.tokens,
            columns,
            dtype=self.dtype,
            budget_bytes=None if budget_mib is None else budget_mib << 20,
        )
        # Scored rows, their gradient, and the gradient of all rows before and after its reduction.
        rows = 4 * self.hidden_bytes * self.tokens
        # Autograd needs a gradient of the weight, although DDP's buffer holds the real one.
        stand_in = columns * self.hidden_bytes
        return int(logits.training_bytes + rows + stand_in + self._norm() * self.tokens)

    def _layer(self, layer: Sequence[ParamMapping]) -> tuple[float, float]:
        """Bytes a token: what one layer keeps, and the gradients alive at once in its backward."""
        routing, ffn, copies, shared = self.spec.experts, self.spec.intermediate_size, 1, 0
        experts = max(mapping.num_experts for mapping in layer)
        if routing and experts:
            ffn, copies, shared = routing.ffn, routing.per_token, routing.shared_ffn
        qk_norm = any("q_norm" in name for mapping in layer for name, _ in mapping.huggingface)
        norms = 4 if self.spec.post_norms else 2
        kept = norms * self._norm() + self._attention(qk_norm) + self._mlp(ffn, experts, copies)
        kept += self._mlp(shared, 0, 1)
        # Sequence parallelism gathers the linears' inputs and gradients.
        hidden = (2 if self.sp > 1 else 1) * self.spec.hidden_size
        return kept, (2 * max(ffn * copies, shared) / self.tp + hidden) * self.itemsize

    def _norm(self) -> float:
        """An RMSNorm's input, and its output for the next linear."""
        # Megatron's own norm works in float32.
        kept = self.hidden_bytes if self.fused else 2 * FLOAT32 * self.spec.hidden_size
        return (kept + self.hidden_bytes + FLOAT32) / self.sp

    def _attention(self, qk_norm: bool) -> float:
        model, b = self.spec.sizes, self.itemsize
        q, k = model["query"] / self.tp, model["key"] / self.tp
        # The value is a view that keeps the whole projection; rotated query and key are copies.
        kept = (q + 2 * k) * b + (q + k) * b
        kept += q * b  # input of the output projection
        lse = self.spec.num_attention_heads / self.tp * FLOAT32
        selective = self.megatron.recompute_granularity == "selective"
        if self.fused:
            return kept + (0 if selective else lse) + ((q + k) * b if qk_norm else 0)
        if not selective:
            kept += q * b + lse  # the kernel's own output, one packed sequence at a time
        if self.cp > 1:
            kept += 2 * k * self.cp * b  # keys and values of all context-parallel ranks
        kept += 4 * model["head_dim"] * b  # cosines and sines, for query and key
        return kept + (2 * FLOAT32 * (q + k) if qk_norm else 0)

    def _mlp(self, ffn: int, experts: int, copies: int) -> float:
        """Gate, up projection, their product; unfused also the gate's SiLU and a copy."""
        widths = 3 if self.fused else 5
        if not experts:
            return widths * ffn / self.tp * self.itemsize
        # Balanced routing: a rank computes its tokens x experts per token. Dispatch and combine
        # both keep these copies.
        m = self.megatron
        whole = m.expert_tensor_parallel_size in (None, self.tp)
        hidden = self.spec.hidden_size / (1 if whole else self.sp)
        return copies * self.itemsize * (2 * hidden + widths * ffn / self.tp) + experts * FLOAT32
