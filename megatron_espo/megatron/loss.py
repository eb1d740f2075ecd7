"""The loss function that Megatron's schedule calls on the head's output of a micro-batch."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_espo.algo import (
    LossInputs,
    Objective,
    TokenSegments,
    entropy_shape,
    kl_estimate,
    rollout_correction,
    rollout_mask,
)
from megatron_espo.config import Algorithm
from megatron_espo.data.packing import MicroBatch
from megatron_espo.monitoring.metrics import loss_metrics

Recorder = Callable[[MicroBatch, TokenSegments], None]


@dataclass(frozen=True)
class PolicyLoss:
    """``loss_func(batch, output)``: objective, rollout correction, KL penalty, entropy bonus and
    metrics.

    Collectives over the context-parallel group: sums over segments and responses, and the entropies
    of whole responses while their groups are not known.

    Attributes:
        objective: the policy objective.
        algorithm: the ``algorithm`` section of the configuration; ``rollout_correction`` and the
            coefficients are read.
        cp_group: context-parallel process group.
        vocab_size: the true vocabulary.
        record: called with each trained micro-batch and the segments of its whole responses; it
            must not communicate.
    """

    objective: Objective
    algorithm: Algorithm
    cp_group: dist.ProcessGroup
    vocab_size: int
    record: Recorder | None = None

    def __call__(self, batch: MicroBatch, output: Tensor, non_loss_data: bool = False):
        """``(loss sum, token count, metrics)``; with ``non_loss_data`` (scoring) the detached
        ``output``.

        Args:
            output: ``[2, trained_tokens]`` float32: log-probs with gradient, entropies.
        """
        if non_loss_data:
            return output.detach()
        logprob, entropy = output[0], output[1]
        # Without a scoring pass this is the first step on its rollouts: the policy is still the old
        # policy.
        old_logprob = logprob.detach() if batch.old_logprob is None else batch.old_logprob
        old_entropy = entropy.detach() if batch.old_entropy is None else batch.old_entropy
        segments, advantage = self._segment_tokens(batch, old_entropy)
        weight, per_token = self._corrected(segments, old_logprob, batch.rollout_logprob)
        corrected, total = replace(segments, weight=weight), self._sum_over_ranks
        inputs = LossInputs(logprob, old_logprob, advantage, corrected, entropy, total)
        result = self.objective.loss(inputs)
        penalty = logprob.new_zeros(())
        if batch.reference_logprob is not None:
            kl = kl_estimate(logprob, batch.reference_logprob)
            penalty = penalty + self.algorithm.kl_coef * (segments.weight * kl).sum()
            per_token["kl/reference"] = kl.detach()
        if self.algorithm.entropy_coef:
            penalty = penalty - self.algorithm.entropy_coef * (segments.weight * entropy).sum()
        metrics = loss_metrics(self.objective, inputs, result, batch.rollout_logprob, per_token)
        count = torch.tensor(batch.num_tokens, dtype=torch.int, device=logprob.device)
        return (result.loss + penalty) * batch.totals.num_tokens, count, metrics

    def _segment_tokens(self, batch: MicroBatch, entropy: Tensor) -> tuple[TokenSegments, Tensor]:
        """Segment whole responses; return segments and advantages of this context-parallel rank's
        tokens.
        """
        advantage, local = batch.advantage, batch.local_tokens
        if local is not None:
            whole = entropy.new_zeros(int(batch.lengths.sum()))
            entropy = self._sum_over_ranks(whole.index_copy_(0, local, entropy))
        segments = self.objective.segment_tokens(
            entropy,
            batch.lengths,
            vocab_size=self.vocab_size,
            num_responses=batch.totals.num_responses,
            num_tokens=batch.totals.num_response_tokens,
        )
        if self.record is not None:
            self.record(batch, segments)
        if batch.zero_variance is not None:
            shape = entropy_shape(segments.entropy, segments.response, batch.zero_variance)
            advantage = advantage * (shape if local is None else shape[local])
        return segments if local is None else segments.select(local), advantage

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        if self.cp_group.size() > 1:
            dist.all_reduce(values, group=self.cp_group)
        return values

    def _corrected(
        self, segments: TokenSegments, old_logprob: Tensor, rollout_logprob: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weights after the rollout correction, and metrics, each ``[tokens]``."""
        settings, tokens = self.algorithm, (old_logprob, rollout_logprob, segments)
        weight = segments.weight
        report: dict[str, Tensor] = {}
        mode, cap = settings.rollout_correction, settings.rollout_correction_cap
        if mode != "off":
            floor = settings.rollout_correction_floor
            factor = rollout_correction(
                *tokens,
                level="token" if mode == "metrics" else mode,
                cap=cap,
                floor=floor,
                sum_over_ranks=self._sum_over_ranks,
            )
            report["rollout_correction/weight"] = factor
            report["rollout_correction/limited"] = ((factor >= cap) | (factor <= floor)).float()
            if mode != "metrics":
                weight = weight * factor
        if settings.rollout_mask:
            kept = rollout_mask(*tokens, settings.rollout_mask, sum_over_ranks=self._sum_over_ranks)
            report["rollout_correction/masked"] = (~kept).float()
            weight = weight * kept
        return weight, report
