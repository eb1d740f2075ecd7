"""What is trained on: a response with its advantage, a micro-batch of them, and the sizes of a whole step."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class TrainSequence:
    """One prompt and response with its advantage.

    Attributes:
        prompt_ids: at least one token id: the hidden state of the last one predicts the first response token.
        response_ids: at least one token id.
        rollout_logprobs: the engine's log-probs of ``response_ids`` (nats).
        advantage: of every token of the response.
        masked: gives no gradient (a truncated response, for example), but counts in the denominators.
        old_logprobs, old_entropies: the old policy's (nats), where they are known already; ``None``: from a scoring pass, or
            the policy itself on the first step on these rollouts.
        watched: number of the response among those whose entropies are to be reported token by token; ``None``: not among them.
        routed_experts: ``[prompt + response - 1, layers with experts, experts a token]`` integers: the experts that the engine chose for every token
            but the last, which predicts nothing. ``None``: the trainer's routers choose.

    Raises:
        ValueError: an empty prompt or response, or per-token values that do not match the response.
    """

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    rollout_logprobs: Sequence[float]
    advantage: float
    masked: bool = False
    old_logprobs: Sequence[float] | None = None
    old_entropies: Sequence[float] | None = None
    watched: int | None = None
    routed_experts: np.ndarray | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        prompt, response, logprobs = len(self.prompt_ids), len(self.response_ids), len(self.rollout_logprobs)
        if not prompt or not response or logprobs != response:
            raise ValueError(
                "TrainSequence: expected a prompt and a response of at least one token, and a log-prob for each "
                f"response token, got {prompt} prompt tokens, {response} response tokens and {logprobs} log-probs"
            )
        for name in ("old_logprobs", "old_entropies"):
            values = getattr(self, name)
            if values is not None and len(values) != response:
                raise ValueError(f"TrainSequence: expected {response} {name}, one a response token, got {len(values)}")
        experts = self.routed_experts
        if experts is not None and (experts.ndim != 3 or len(experts) != prompt + response - 1):
            expected = f"[{prompt + response - 1}, layers, top_k]"
            raise ValueError(f"TrainSequence: expected routed_experts {expected}, one row a token but the last, got {list(experts.shape)}")

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class BatchTotals:
    """Sizes of one optimizer step's whole batch, over all data-parallel ranks; the denominators of the loss.

    ``num_responses`` and ``num_response_tokens`` count every response, also those that need no gradient; ``num_tokens``
    counts the tokens (prompts included) that really go through the model and is what Megatron's schedule divides
    gradients by.
    """

    num_responses: int
    num_response_tokens: int
    num_tokens: int


@dataclass(frozen=True)
class MicroBatch:
    """Sequences as the model and the loss take them: laid one after the other (THD), or side by side in rows, padded.

    Under context parallelism ``total`` and ``response_tokens`` are this rank's; ``cu_seqlens``, ``max_seqlen`` and ``lengths`` the whole's.

    Attributes:
        tokens: int64 token ids, ``[1, total]`` packed or ``[sequences, longest]`` padded.
        position_ids: int64, of the same shape, from 0 in each sequence.
        cu_seqlens: ``[sequences + 1]`` int32 borders; ``None`` in a padded micro-batch.
        max_seqlen: tokens of the longest sequence.
        predict: ``[response_tokens]`` int64, row of the model's hidden states (``[total, hidden]``, or ``[longest, sequences, hidden]``
            flattened) that predicts each response token.
        targets: ``[response_tokens]`` int64, those response tokens.
        lengths: ``[responses]`` int64 response lengths.
        advantage, rollout_logprob: ``[response_tokens]`` float32.
        totals: sizes of the whole optimizer step.
        num_tokens: real tokens (padding excluded); under context parallelism all of them on the first rank and 0 on others.
        scored: ``[response_tokens]`` int64, which of the whole micro-batch's response tokens these are; ``None``: all.
        branches: where prompts are shared: for each sequence of ``cu_seqlens`` the lengths of its trunk and of the branches after it,
            each of which attends to the trunk and itself; ``None``: plain sequences.
        old_logprob, old_entropy: ``[response_tokens]`` float32, of the old policy (nats), from a scoring pass; ``None`` when the
            step is the first on its rollouts, where the policy itself is the old policy.
        reference_logprob: ``[response_tokens]`` float32, of the frozen reference (nats); ``None`` without a KL penalty.
        watched: for each response its :attr:`TrainSequence.watched`.
        routed_experts: ``[rows, layers with experts, experts a token]`` int16, in the order of ``predict``'s rows: the engine's choices; -1 where there is
            none (padding, last tokens): the router's own. ``None``: its own everywhere.
    """

    tokens: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor | None
    max_seqlen: int
    predict: Tensor
    targets: Tensor
    lengths: Tensor
    advantage: Tensor
    rollout_logprob: Tensor
    totals: BatchTotals
    num_tokens: int
    scored: Tensor | None = None
    branches: tuple[tuple[int, ...], ...] | None = None
    old_logprob: Tensor | None = None
    old_entropy: Tensor | None = None
    reference_logprob: Tensor | None = None
    watched: tuple[int | None, ...] = ()
    routed_experts: Tensor | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch with its tensors on ``device``."""
        return replace(self, **{n: value.to(device) for n, value in vars(self).items() if isinstance(value, Tensor)})
