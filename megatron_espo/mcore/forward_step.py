"""The door into Megatron's pipeline schedule: a ``forward_step_func`` whose loss is the policy objective."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_espo.algo import annotate, policy_loss
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

    def loss_func(batch: MicroBatch, output: Tensor, non_loss_data: bool = False):
        logprob, entropy = output[0], output[1].detach()
        annotation = batch.annotation or annotate(
            entropy,
            batch.lengths,
            algorithm,
            vocab_size=vocab_size,
            num_responses=batch.totals.num_responses,
            num_tokens=batch.totals.num_response_tokens,
            max_response_tokens=max_response_tokens,
        )
        if non_loss_data:
            return logprob.detach(), annotation
        # Without a scoring pass this step is the first on its rollouts: the policy is still the old policy.
        old_logprob = logprob.detach() if batch.old_logprob is None else batch.old_logprob
        result = policy_loss(logprob, old_logprob, batch.advantage, annotation, algorithm)
        count = torch.tensor(batch.num_tokens, dtype=torch.int, device=logprob.device)
        metrics = loss_metrics(result, annotation, old_logprob, batch.rollout_logprob, len(algorithm.quantiles) + 1)
        return result.loss * batch.totals.num_tokens, count, metrics

    return forward_step


def _sequence_parameters(batch: MicroBatch) -> PackedSeqParams:
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
