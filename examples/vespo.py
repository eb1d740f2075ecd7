"""VESPO (arXiv 2602.10693): an objective of your own in one file.

In the directory that holds ``examples``:

    megatron-espo train run.yaml algorithm.objective=examples.vespo:VESPO
"""

from dataclasses import dataclass

import torch

from megatron_espo.algo import LossInputs, LossOutput, Objective


@dataclass(frozen=True, kw_only=True)
class VESPO(Objective):
    """A soft weight of whole responses instead of clipping.

    A token's surrogate is ``sg[φ(W)] A log π_θ`` with ``φ(W) = W^k exp(λ (1 - W))`` and the ratio
    ``W`` of the whole response, without length normalization.

    Attributes:
        k_pos, lambda_pos: ``k`` and ``λ`` of tokens with ``A > 0``.
        k_neg, lambda_neg: the same of the others.
    """

    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0

    segmentation = "response"
    aggregation = "token"

    def loss(self, inputs: LossInputs) -> LossOutput:
        advantage, segments = inputs.advantage, inputs.segments
        # The mean over a response sums over context-parallel ranks.
        exponent = inputs.response_mean(inputs.log_ratio) * segments.length[segments.response]
        exponent = exponent.clamp(-20, 20)
        ratio, positive = exponent.exp(), advantage > 0
        k = torch.full_like(ratio, self.k_neg).masked_fill(positive, self.k_pos)
        scale = torch.full_like(ratio, self.lambda_neg).masked_fill(positive, self.lambda_pos)
        weight = (k * exponent + scale * (1 - ratio)).exp()
        return inputs.output(weight * advantage * inputs.logprob, ratio, advantage == 0)
