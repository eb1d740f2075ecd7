"""From hidden states to log-probs and entropies of the response tokens, on the vocabulary shard."""

import inspect
from functools import cache
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_espo.data.packing import MicroBatch
from megatron_espo.numerics import linear_logprob_entropy


class LogProbEntropyHead:
    """An ``output_processor`` for ``GPTModel``: hidden states -> ``[2, response_tokens]`` float32, log-probs above entropies.

    Only the positions that predict a response token are multiplied with the output weight: prompt logits never exist. Collectives
    are those of :func:`megatron_espo.numerics.linear_logprob_entropy` over ``group``.

    Args:
        group: tensor-parallel process group.
        temperature: the sampling temperature.
        vocab_size: the true vocabulary; Megatron's padding takes no probability.
        entropy_grad: whether the entropies have a gradient.
        budget_bytes: limit of the memory that grows with the vocabulary (:func:`megatron_espo.numerics.plan_head`); ``None``: no limit.
    """

    def __init__(
        self,
        group,
        *,
        temperature: float,
        vocab_size: int,
        entropy_grad: bool = False,
        budget_bytes: int | None = None,
    ) -> None:
        self.group = group
        self.temperature = temperature
        self.vocab_size = vocab_size
        self.entropy_grad = entropy_grad
        self.budget_bytes = budget_bytes

    def __call__(
        self, *, hidden_states: Tensor, output_layer, output_weight: Tensor | None, context: MicroBatch, **_: Any
    ) -> Tensor:
        """Apply to ``hidden_states [length (/tp under sequence parallelism), rows, hidden]`` with the micro-batch as ``context``."""
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
    """Whether this Megatron-Core (0.19 and newer) hands hidden states to a callable of ours."""
    return "output_processor" in inspect.signature(GPTModel.forward).parameters


def forward_with_head(model, head: LogProbEntropyHead, context: MicroBatch, **inputs: Any) -> Tensor:
    """Run ``model(**inputs)``; on the last pipeline stage its output is ``head``'s, elsewhere the hidden states.

    Megatron-Core before 0.19 has no ``output_processor``: there the model returns its hidden states (its ``post_process`` flag is off for the
    call) and the head is applied to them.
    """
    if has_output_processor():
        return model(**inputs, output_processor=head, output_processor_context=context)
    core = unwrap_model(model)
    if not core.post_process:
        return model(**inputs)
    core.post_process = False
    try:
        hidden_states = model(**inputs)
    finally:
        core.post_process = True
    tied = core.share_embeddings_and_output_weights
    output_weight = core.shared_embedding_or_output_weight() if tied else None
    return head(hidden_states=hidden_states, output_layer=core.output_layer, output_weight=output_weight, context=context)
