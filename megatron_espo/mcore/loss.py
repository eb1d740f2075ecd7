"""The loss function that Megatron's schedule calls: head's output of one micro-batch -> objective, regularizers, metrics."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_espo.algo import Annotation, annotate, kl_estimate, policy_loss, rollout_correction
from megatron_espo.data.packing import MicroBatch
from megatron_espo.metrics import loss_metrics

Observe = Callable[[MicroBatch, Annotation], None]


class PolicyLoss:
    """``loss_func(batch, output)`` of the configured objective; see :func:`megatron_espo.mcore.forward_step.make_forward_step`.

    Collectives over the context-parallel group: per-segment (and per-response) sums, and the entropies where groups are still to be formed.

    Args:
        algorithm: the ``algorithm`` section of the configuration.
        cp_group: context-parallel process group.
        vocab_size: the true vocabulary.
        max_response_tokens: the generation limit; only Dr. GRPO's weights need it.
        observe: called with each trained micro-batch and the annotation of its whole responses, to report on them.
    """

    def __init__(
        self, algorithm, *, cp_group, vocab_size: int, max_response_tokens: int | None, observe: Observe | None = None
    ) -> None:
        self.algorithm = algorithm
        self.cp_group = cp_group
        self.vocab_size = vocab_size
        self.max_response_tokens = max_response_tokens
        self.observe = observe

    def __call__(self, batch: MicroBatch, output: Tensor, non_loss_data: bool = False):
        """``(loss sum, token count, metrics)``; with ``non_loss_data`` (scoring) the detached ``output``.

        Args:
            output: ``[2, trained_tokens]`` float32: log-probs with gradient, entropies.
        """
        if non_loss_data:
            return output.detach()
        logprob, entropy = output[0], output[1]
        # Without a scoring pass this step is the first on its rollouts: the policy is still the old policy.
        old_logprob = logprob.detach() if batch.old_logprob is None else batch.old_logprob
        annotation = self._annotate(batch, entropy.detach() if batch.old_entropy is None else batch.old_entropy)
        corrected, per_token = self._correct(annotation, old_logprob, batch.rollout_logprob)
        result = policy_loss(
            logprob, old_logprob, batch.advantage, corrected, self.algorithm, reduce_segments=self._sum_over_slices
        )
        penalty, values = self._penalty(logprob, entropy, annotation.weight, batch)
        metrics = loss_metrics(
            result,
            annotation,
            old_logprob,
            batch.rollout_logprob,
            len(self.algorithm.quantiles) + 1,
            per_token=per_token | values,
        )
        count = torch.tensor(batch.num_tokens, dtype=torch.int, device=logprob.device)
        return (result.loss + penalty) * batch.totals.num_tokens, count, metrics

    def _annotate(self, batch: MicroBatch, entropy: Tensor) -> Annotation:
        """Groups, bounds and weights on whole responses; then this context-parallel rank's tokens of them."""
        if batch.local_tokens is not None:
            whole = entropy.new_zeros(int(batch.lengths.sum()))
            entropy = self._sum_over_slices(whole.index_copy_(0, batch.local_tokens, entropy))
        annotation = annotate(
            entropy,
            batch.lengths,
            self.algorithm,
            vocab_size=self.vocab_size,
            num_responses=batch.totals.num_responses,
            num_tokens=batch.totals.num_response_tokens,
            max_response_tokens=self.max_response_tokens,
        )
        if self.observe is not None:
            self.observe(batch, annotation)
        return annotation if batch.local_tokens is None else annotation.take(batch.local_tokens)

    def _sum_over_slices(self, values: Tensor) -> Tensor:
        if self.cp_group.size() > 1:
            dist.all_reduce(values, group=self.cp_group)
        return values

    def _correct(self, annotation: Annotation, old_logprob: Tensor, rollout_logprob: Tensor):
        """The annotation with weights corrected for the engine's mismatch, and what to report of it."""
        mode = self.algorithm.rollout_correction
        if mode == "off":
            return annotation, {}
        cap = self.algorithm.rollout_correction_cap
        factor = rollout_correction(
            old_logprob,
            rollout_logprob,
            annotation,
            level="token" if mode == "metrics" else mode,
            cap=cap,
            reduce_segments=self._sum_over_slices,
        )
        report = {"rollout_correction/weight": factor, "rollout_correction/truncated": (factor >= cap).float()}
        return (annotation if mode == "metrics" else replace(annotation, weight=annotation.weight * factor)), report

    def _penalty(self, logprob: Tensor, entropy: Tensor, weight: Tensor, batch: MicroBatch):
        """KL penalty and entropy bonus with the objective's own token weights, and what to report of them."""
        penalty, report = logprob.new_zeros(()), {}
        if batch.reference_logprob is not None:
            kl = kl_estimate(logprob, batch.reference_logprob)
            penalty = penalty + self.algorithm.kl_coef * (weight * kl).sum()
            report["kl/reference"] = kl.detach()
        if self.algorithm.entropy_coef:
            penalty = penalty - self.algorithm.entropy_coef * (weight * entropy).sum()
        return penalty, report
