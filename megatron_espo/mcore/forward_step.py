"""The door into Megatron's pipeline schedule: a ``forward_step_func`` whose loss is the policy objective."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_espo.algo import Annotation, annotate, policy_loss
from megatron_espo.data.packing import MicroBatch
from megatron_espo.mcore.head import LogProbEntropyHead, forward_with_head
from megatron_espo.metrics import loss_metrics


def make_forward_step(
    algorithm, *, groups, vocab_size: int, temperature: float = 1.0, max_response_tokens: int | None = None
) -> Callable[[Iterator[MicroBatch], torch.nn.Module], tuple[Tensor, Callable]]:
    """Build the ``forward_step_func`` that Megatron's ``get_forward_backward_func()`` takes.

    The model's configuration must have ``calculate_per_token_loss=True``: each micro-batch returns ``(sum, count, metrics)``, where
    the count is its tokens and the sum is scaled by all tokens of the step, so that what the schedule divides by cancels exactly. The gradient
    is that of ``-Σ_t w_t surrogate_t`` over the whole batch, however it was cut.

    Collectives over the context-parallel group: per-segment sums of log-ratios, and the entropies where groups are still to be formed.

    With ``collect_non_loss_data=True`` the schedule collects ``(old_logprob, annotation)`` per micro-batch instead (the scoring pass).

    Args:
        algorithm: the ``algorithm`` section of the configuration (:class:`megatron_espo.config.Algorithm`).
        groups: Megatron's ``ProcessGroupCollection``.
        vocab_size: the true vocabulary (tokenizer's or ``config.json``'s), not Megatron's padded one.
        temperature: the sampling temperature of the rollouts.
        max_response_tokens: the generation limit; only Dr. GRPO's weights need it.
    """
    head = LogProbEntropyHead(groups.tp, temperature=temperature, vocab_size=vocab_size)

    def forward_step(data_iterator: Iterator[MicroBatch], model) -> tuple[Tensor, Callable]:
        batch = next(data_iterator).to(torch.cuda.current_device())
        packed = _sequence_parameters(batch)
        inputs = {"input_ids": batch.tokens, "position_ids": batch.position_ids, "attention_mask": None}
        output = forward_with_head(model, head, batch, **inputs, packed_seq_params=packed)
        return output, partial(loss_func, batch)

    def annotation_of(batch: MicroBatch, entropy: Tensor) -> Annotation:
        annotation = annotate(
            entropy if batch.scored is None else sum_over_slices(_place(entropy, batch)),
            batch.lengths,
            algorithm,
            vocab_size=vocab_size,
            num_responses=batch.totals.num_responses,
            num_tokens=batch.totals.num_response_tokens,
            max_response_tokens=max_response_tokens,
        )
        return annotation if batch.scored is None else annotation.take(batch.scored)

    def sum_over_slices(values: Tensor) -> Tensor:
        if groups.cp.size() > 1:
            dist.all_reduce(values, group=groups.cp)
        return values

    def loss_func(batch: MicroBatch, output: Tensor, non_loss_data: bool = False):
        logprob, entropy = output[0], output[1].detach()
        annotation = batch.annotation or annotation_of(batch, entropy)
        if non_loss_data:
            return logprob.detach(), annotation
        # Without a scoring pass this step is the first on its rollouts: the policy is still the old policy.
        old_logprob = logprob.detach() if batch.old_logprob is None else batch.old_logprob
        result = policy_loss(
            logprob, old_logprob, batch.advantage, annotation, algorithm, reduce_segments=sum_over_slices
        )
        count = torch.tensor(batch.num_tokens, dtype=torch.int, device=logprob.device)
        metrics = loss_metrics(result, annotation, old_logprob, batch.rollout_logprob, len(algorithm.quantiles) + 1)
        return result.loss * batch.totals.num_tokens, count, metrics

    return forward_step


def _place(values: Tensor, batch: MicroBatch) -> Tensor:
    """``values`` of this context-parallel rank's response tokens among the whole micro-batch's, zero elsewhere."""
    return values.new_zeros(int(batch.lengths.sum())).index_copy_(0, batch.scored, values)


def _sequence_parameters(batch: MicroBatch) -> PackedSeqParams | None:
    if batch.cu_seqlens is None:
        return None
    borders = {
        "qkv_format": "thd",
        "cu_seqlens_q": batch.cu_seqlens,
        "cu_seqlens_kv": batch.cu_seqlens,
        "max_seqlen_q": batch.max_seqlen,
        "max_seqlen_kv": batch.max_seqlen,
    }
    if batch.branches is None:
        return PackedSeqParams(**borders)
    from megatron_espo.mcore.attention import BranchedSeqParams

    return BranchedSeqParams(**borders, branches=batch.branches, position_ids=batch.position_ids)
