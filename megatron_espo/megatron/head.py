"""From hidden states to log-probs and entropies of the response tokens, on the vocabulary shard."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
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
            sampling_mask=context.sampling_mask,
            temperature=self.temperature,
            vocab_size=self.vocab_size,
            entropy_grad=self.entropy_grad,
            budget_bytes=self.budget_bytes,
            sequence_parallel=output_layer.sequence_parallel,
            # A bfloat16 logit of 20 is off by up to 0.06 nats; the engine's head is float32 too.
            float32_logits=True,
        )
        return torch.stack([logprob, entropy])
