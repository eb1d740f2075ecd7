"""SAPO (Soft Adaptive Policy Optimization, arXiv 2511.20347): an objective of your own in one file.

In the directory that holds ``examples``:

    megatron-espo train run.yaml algorithm.objective=examples.sapo:SAPO
"""

from dataclasses import dataclass

import torch

from megatron_espo.algo import LossInputs, LossOutput, Objective, importance_ratio


@dataclass(frozen=True, kw_only=True)
class SAPO(Objective):
    """A sigmoid gate instead of clipping: a token's surrogate is ``4/τ · sigmoid(τ (r - 1)) · A``.

    Attributes:
        tau_pos: temperature ``τ`` of tokens with ``A > 0``.
        tau_neg: the same of the others; larger, so that their gradients vanish sooner.
    """

    tau_pos: float = 1.0
    tau_neg: float = 1.05

    segmentation = "token"
    aggregation = "response"

    def loss(self, inputs: LossInputs) -> LossOutput:
        advantage = inputs.advantage
        ratio = importance_ratio(inputs.log_ratio, inputs.logprob)
        tau = torch.full_like(advantage, self.tau_neg).masked_fill(advantage > 0, self.tau_pos)
        gate = 4 / tau * torch.sigmoid(tau * (ratio - 1))
        return inputs.output(gate * advantage, ratio, advantage == 0)
