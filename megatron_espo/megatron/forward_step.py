"""A ``forward_step_func`` for Megatron's schedule whose loss is the policy objective."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_espo.algo import load_objective
from megatron_espo.config import Algorithm
from megatron_espo.data.packing import MicroBatch
from megatron_espo.megatron.attention import SharedPrefixSeqParams
from megatron_espo.megatron.loss import PolicyLoss, Recorder
from megatron_espo.megatron.router_replay import RouterReplay
from megatron_espo.numerics import linear_logprob_entropy


def make_forward_step(
    algorithm: Algorithm,
    *,
    groups: ProcessGroupCollection,
    vocab_size: int,
    temperature: float = 1.0,
    max_response_tokens: int | None = None,
    head_budget_bytes: int | None = None,
    record: Recorder | None = None,
    router_replay: RouterReplay | None = None,
) -> Callable[[Iterator[MicroBatch], torch.nn.Module], tuple[Tensor, Callable]]:
    """Build the ``forward_step_func`` for Megatron's ``get_forward_backward_func()``.

    The model's configuration must have ``calculate_per_token_loss=True``. A micro-batch returns
    ``(sum, count, metrics)``; the count is its number of tokens, and the sum is scaled by all
    tokens of the step. The schedule divides by the total count, so the gradient is that of ``-Σ_t
    w_t surrogate_t`` (with KL penalty and entropy bonus) over the whole batch, for every layout and
    packing. With ``collect_non_loss_data=True`` (scoring) the schedule collects each micro-batch's
    log-probs and entropies instead.

    Args:
        algorithm: the ``algorithm`` section of the configuration.
        groups: Megatron's process groups.
        vocab_size: the true vocabulary (of the tokenizer or ``config.json``), without Megatron's
            padding.
        temperature: the sampling temperature of the rollouts.
        max_response_tokens: the generation limit; Dr. GRPO needs it.
        head_budget_bytes: limit of the memory for logits
            (:func:`megatron_espo.numerics.plan_head`); ``None``: no limit.
        record: see :class:`~megatron_espo.megatron.loss.PolicyLoss`.
        router_replay: makes the model's routers take ``MicroBatch.routed_experts``; ``None``: they
            choose themselves.

    Raises:
        InputError: an unknown objective, or settings that it does not have.
    """
    objective = load_objective(algorithm, max_response_tokens=max_response_tokens)
    options = {
        "group": groups.tp,
        "temperature": temperature,
        "vocab_size": vocab_size,
        "entropy_grad": bool(algorithm.entropy_coef) or objective.uses_entropy,
        "budget_bytes": head_budget_bytes,
    }
    head = partial(score_tokens, options)
    loss = PolicyLoss(objective, algorithm, groups.cp, vocab_size, record)

    def forward_step(data_iterator: Iterator[MicroBatch], model) -> tuple[Tensor, Callable]:
        batch = next(data_iterator).to(torch.device(torch.cuda.current_device()))
        if router_replay is not None:
            router_replay.give(model, batch.routed_experts)
        output = model(
            input_ids=batch.tokens,
            position_ids=batch.position_ids,
            attention_mask=None,
            packed_seq_params=_sequence_parameters(batch),
            output_processor=head,
            output_processor_context=batch,
        )
        if router_replay is not None:
            router_replay.follow(model, batch.routed_experts, output)
        return output, partial(loss, batch)

    return forward_step


def score_tokens(
    options: dict[str, Any],
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    context: MicroBatch,
    **_: Any,
) -> Tensor:
    """Log-probs and entropies as ``[2, trained_tokens]`` float32: an ``output_processor`` of
    ``GPTModel``.

    Only the positions that predict a trained token are multiplied with the output weight. The
    collectives are those of :func:`megatron_espo.numerics.linear_logprob_entropy`.

    Args:
        options: further arguments of ``linear_logprob_entropy``.
        hidden_states: ``[length, rows, hidden]``; with sequence parallelism ``[length/tp, ...]``.
        output_layer: holds the weight, unless ``output_weight`` (a tied embedding) is given.
        context: the micro-batch.
    """
    scored = linear_logprob_entropy(
        hidden_states.flatten(0, 1),
        output_layer.weight if output_weight is None else output_weight,
        context.targets,
        positions=context.logit_positions,
        sampling_mask=context.sampling_mask,
        sequence_parallel=output_layer.sequence_parallel,
        **options,
    )
    return torch.stack(scored)


def _sequence_parameters(batch: MicroBatch) -> PackedSeqParams | None:
    if batch.cu_seqlens is None:
        return None
    return SharedPrefixSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
        prefix_groups=batch.prefix_groups,
        position_ids=None if batch.prefix_groups is None else batch.position_ids,
    )
