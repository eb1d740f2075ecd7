"""The door into Megatron's pipeline schedule: a ``forward_step_func`` whose loss is the policy objective."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_espo.data.packing import MicroBatch
from megatron_espo.mcore.head import LogProbEntropyHead, forward_with_head
from megatron_espo.mcore.loss import Observe, PolicyLoss
from megatron_espo.mcore.router_replay import RouterReplay


def make_forward_step(
    algorithm,
    *,
    groups,
    vocab_size: int,
    temperature: float = 1.0,
    max_response_tokens: int | None = None,
    head_budget_bytes: int | None = None,
    observe: Observe | None = None,
    router_replay: RouterReplay | None = None,
) -> Callable[[Iterator[MicroBatch], torch.nn.Module], tuple[Tensor, Callable]]:
    """Build the ``forward_step_func`` that Megatron's ``get_forward_backward_func()`` takes.

    The model's configuration must have ``calculate_per_token_loss=True``: each micro-batch returns ``(sum, count, metrics)``, where
    the count is its tokens and the sum is scaled by all tokens of the step, so that what the schedule divides by cancels exactly. The gradient
    is that of ``-Σ_t w_t surrogate_t`` (and of the KL penalty and the entropy bonus) over the whole batch, however it was cut.

    With ``collect_non_loss_data=True`` the schedule collects each micro-batch's log-probs and entropies instead (the scoring pass).

    Args:
        algorithm: the ``algorithm`` section of the configuration (:class:`megatron_espo.config.Algorithm`).
        groups: Megatron's ``ProcessGroupCollection``.
        vocab_size: the true vocabulary (tokenizer's or ``config.json``'s), not Megatron's padded one.
        temperature: the sampling temperature of the rollouts.
        max_response_tokens: the generation limit; only Dr. GRPO's weights need it.
        head_budget_bytes: limit of the memory for logits (:func:`megatron_espo.numerics.plan_head`); ``None``: no limit.
        observe: called with each trained micro-batch and its annotation on the last pipeline stage, to report on them; it must not talk to
            other ranks.
        router_replay: of the model's routers, which then take ``MicroBatch.routed_experts``; ``None``: they choose for themselves.
    """
    head = LogProbEntropyHead(
        groups.tp,
        temperature=temperature,
        vocab_size=vocab_size,
        entropy_grad=bool(algorithm.entropy_coef),
        budget_bytes=head_budget_bytes,
    )
    loss = PolicyLoss(
        algorithm,
        cp_group=groups.cp,
        vocab_size=vocab_size,
        max_response_tokens=max_response_tokens,
        observe=observe,
    )

    def forward_step(data_iterator: Iterator[MicroBatch], model) -> tuple[Tensor, Callable]:
        batch = next(data_iterator).to(torch.cuda.current_device())
        packed = _sequence_parameters(batch)
        inputs = {"input_ids": batch.tokens, "position_ids": batch.position_ids, "attention_mask": None}
        if router_replay is not None:
            router_replay.give(model, batch.routed_experts)
        output = forward_with_head(model, head, batch, **inputs, packed_seq_params=packed)
        if router_replay is not None:
            router_replay.follow(model, batch.routed_experts, output)
        return output, partial(loss, batch)

    return forward_step


def _sequence_parameters(batch: MicroBatch) -> PackedSeqParams | None:
    if batch.cu_seqlens is None:
        return None
    boundaries = {
        "qkv_format": "thd",
        "cu_seqlens_q": batch.cu_seqlens,
        "cu_seqlens_kv": batch.cu_seqlens,
        "max_seqlen_q": batch.max_seqlen,
        "max_seqlen_kv": batch.max_seqlen,
    }
    if batch.branches is None:
        return PackedSeqParams(**boundaries)
    from megatron_espo.mcore.attention import BranchedSeqParams

    return BranchedSeqParams(**boundaries, branches=batch.branches, position_ids=batch.position_ids)
