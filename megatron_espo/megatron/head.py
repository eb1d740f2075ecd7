"""From hidden states to log-probs and entropies of the response tokens, on the vocabulary shard."""

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_espo.data.packing import MicroBatch
from megatron_espo.numerics import linear_logprob_entropy


@dataclass(frozen=True)
class LogProbEntropyHead:
    """An ``output_processor`` for ``GPTModel``.

    Only the positions that predict a trained token are multiplied with the output weight. The
    collectives are those of :func:`megatron_espo.numerics.linear_logprob_entropy` over ``group``.

    Attributes:
        group: tensor-parallel process group.
        temperature: the sampling temperature.
        vocab_size: the true vocabulary; Megatron's padding has no probability.
        entropy_grad: whether the entropies have a gradient.
        budget_bytes: limit of the memory that grows with the vocabulary
            (:func:`megatron_espo.numerics.plan_head`); ``None``: no limit.
    """

    group: dist.ProcessGroup
    temperature: float
    vocab_size: int
    entropy_grad: bool = False
    budget_bytes: int | None = None

    def __call__(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        context: MicroBatch,
        **_: Any,
    ) -> Tensor:
        """Log-probs and entropies as ``[2, trained_tokens]`` float32.

        Args:
            hidden_states: ``[length, rows, hidden]``; with sequence parallelism ``[length/tp,
                ...]``.
            output_layer: holds the weight, unless ``output_weight`` (a tied embedding) is given.
            context: the micro-batch.
        """
        logprob, entropy = linear_logprob_entropy(
            hidden_states.flatten(0, 1),
            output_layer.weight if output_weight is None else output_weight,
            context.targets,
            self.group,
            positions=context.logit_positions,
            temperature=self.temperature,
            vocab_size=self.vocab_size,
            entropy_grad=self.entropy_grad,
            budget_bytes=self.budget_bytes,
            sequence_parallel=output_layer.sequence_parallel,
            # A bfloat16 logit of 20 is off by up to 0.06 nats; the engine's head is float32 too.
            float32_logits=True,
        )
        return torch.stack([logprob, entropy])


@cache
def has_output_processor() -> bool:
    """Whether this Megatron-Core (0.19 and newer) has the ``output_processor`` argument."""
    return "output_processor" in inspect.signature(GPTModel.forward).parameters


def forward_with_head(
    model: torch.nn.Module, head: LogProbEntropyHead, context: MicroBatch, **inputs: Any
) -> Tensor:
    """Run ``model(**inputs)``: ``head``'s output on the last pipeline stage, else hidden states.

    Megatron-Core before 0.19 has no ``output_processor``. There the model returns its hidden states
    (its ``post_process`` flag is off during the call), and the head is applied to them.
    """
    if has_output_processor():
        return model(**inputs, output_processor=head, output_processor_context=context)
    core = unwrap_model(model)
    if not core.post_process:
        return model(**inputs)
    core.post_process = False
    try:
        hidden = model(**inputs)
    finally:
        core.post_process = True
    tied = core.share_embeddings_and_output_weights
    weight = core.shared_embedding_or_output_weight() if tied else None
    layer = core.output_layer
    return head(hidden_states=hidden, output_layer=layer, output_weight=weight, context=context)
