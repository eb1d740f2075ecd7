"""Micro-batches of an optimizer step, those in flight on each stage, and the share of time that a pipeline idles."""

from dataclasses import dataclass
from math import ceil
from typing import Any


@dataclass(frozen=True)
class Pipeline:
    """One optimizer step of one data-parallel rank.

    Attributes:
        stages, chunks: pipeline stages, and model chunks on each (virtual pipeline stages).
        tokens: of the largest micro-batch, over all its context-parallel ranks.
        expected_tokens: mean length assumed for a prompt with its response.
        micro_batches: of a step, at that length.
        bubble: share of the step's time that a stage idles, (PP - 1) / (VPP x micro-batches + PP - 1).
    """

    stages: int
    chunks: int
    tokens: int
    expected_tokens: int
    micro_batches: int
    bubble: float

    def in_flight(self, stage: int) -> int:
        """Chunks of micro-batches whose activations a stage holds at once: 1F1B, or interleaved 1F1B."""
        if self.chunks == 1:
            return min(self.stages - stage, self.micro_batches)
        warm_up = 2 * (self.stages - stage - 1) + (self.chunks - 1) * self.stages
        return min(warm_up + 1, self.chunks * self.micro_batches)


def plan_pipeline(config: Any, hf_config: dict[str, Any], data_parallel_size: int, expected_tokens: int | None) -> Pipeline:
    """Micro-batches as ``data.packing`` makes them when every response has the expected length.

    Args:
        expected_tokens: mean tokens of a prompt with its response; None: half of ``rollout.max_response_tokens``.
    """
    megatron, rollout = config.megatron, config.rollout
    longest = rollout.max_model_len or hf_config["max_position_embeddings"]
    expected = min(expected_tokens or max(1, rollout.max_response_tokens // 2), longest)
    capacity = megatron.max_tokens_per_micro_batch
    # A response longer than a micro-batch has one of its own.
    largest = max(capacity, rollout.max_response_tokens)
    each = max(1, capacity // expected)
    if megatron.micro_batch_size:
        each = min(each, megatron.micro_batch_size)
        largest = min(largest, megatron.micro_batch_size * longest)
    responses = rollout.prompts_per_step * rollout.group_size / config.algorithm.num_mini_batches / data_parallel_size
    count = ceil(ceil(responses) / each)
    stages, chunks = megatron.pipeline_model_parallel_size, megatron.virtual_pipeline_model_parallel_size or 1
    if chunks > 1:  # the interleaved schedule takes a multiple of the stages
        count = ceil(count / stages) * stages
    return Pipeline(stages, chunks, largest, expected, count, (stages - 1) / (chunks * count + stages - 1))
