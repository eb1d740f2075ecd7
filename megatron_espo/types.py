"""What the stages hand to each other. Plain data, standard library only."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes:
        id: unique within the prompt source, stable over epochs and restarts.
        text: the prompt as rendered for the model (chat template applied).
        answer: what the reward function compares with.
        token_ids: ``text`` as the trainer's tokenizer encodes it; the rollout engine is given these, never text.
        metadata: whatever the prompt source adds (a reasoning-gym entry, extra columns of the row).
    """

    id: str
    text: str
    answer: str
    token_ids: tuple[int, ...]
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rollout:
    """One sampled response.

    Attributes:
        prompt: the prompt it answers.
        response_ids: sampled token ids, with the end-of-sequence token where the model emitted one.
        logprobs: the log-probs of ``response_ids`` after temperature (nats), one per token, of the engine at the time it sampled the token.
        finish_reason: ``"stop"`` (end of sequence), ``"length"`` (cut off at the limit) or ``"unfinished"`` (to be gone on with; without text).
        policy_version: version of the weights that sampled its first token.
        text: ``response_ids`` decoded by the trainer's tokenizer, without special tokens.
        routed_experts: ``[prompt + response - 1, layers with experts, experts a token]`` uint8 or uint16: where the engine sent each token that went
            through it, which the last one did not. ``None`` where that is not asked for; an unfinished response may lack rows at the end, which come
            when it is gone on with.
    """

    prompt: Prompt
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    policy_version: int
    text: str
    routed_experts: "np.ndarray | None" = field(default=None, compare=False, repr=False)

    @property
    def truncated(self) -> bool:
        """Whether the response hit the length limit."""
        return self.finish_reason == "length"

    @property
    def unfinished(self) -> bool:
        """Whether tokens are still to come."""
        return self.finish_reason == "unfinished"
