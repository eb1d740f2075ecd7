"""Values that the stages pass to each other. Plain data: the standard library and numpy only."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike


@dataclass(frozen=True)
class Prompt:
    """One question.

    Attributes:
        id: unique within the prompt source, stable over epochs and restarts.
        text: the prompt as rendered for the model (chat template applied).
        answer: the value that the reward function compares with.
        token_ids: ``text`` as the trainer's tokenizer encodes it. The rollout engine receives these ids, never text.
        metadata: values that the prompt source adds (a reasoning-gym entry, extra columns of the row).
    """

    id: str
    text: str
    answer: str
    token_ids: tuple[int, ...]
    metadata: dict[str, Any] = field(default_factory=dict)


def as_vector(name: str, values: ArrayLike, dtype: DTypeLike, length: int | None = None) -> np.ndarray:
    """Convert ``values`` to a one-dimensional array. Does not copy an array that already has the dtype.

    Args:
        name: ``Class.field``, for the error.
        values: ``[length]`` numbers.
        dtype: of the result.
        length: expected length; ``None``: any.

    Raises:
        ValueError: another shape, or values of another kind (floats for an integer field).
    """
    array, wanted = np.asarray(values), np.dtype(dtype)
    if array.ndim != 1 or (length is not None and len(array) != length):
        expected = "[any length]" if length is None else f"[{length}]"
        raise ValueError(f"{name}: expected shape {expected}, got {list(array.shape)}")
    # An empty list becomes a float64 array.
    if array.size and not np.can_cast(array.dtype, wanted, "same_kind"):
        raise ValueError(f"{name}: expected dtype {wanted}, got {array.dtype}")
    return array.astype(wanted, copy=False)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One sampled response of one or several turns, exactly as the engine saw it.

    ``T`` is the length of ``response_ids``. Equality compares all fields but ``routed_experts``. A trajectory has no hash.

    Attributes:
        prompt: the prompt that it answers.
        prompt_ids: ``[P]`` int32, the context before the first sampled token (with one turn: ``prompt.token_ids``).
        response_ids: ``[T]`` int32, all tokens after ``prompt_ids``: sampled tokens and, between turns, the environment's.
            Includes the end-of-sequence token where the model sampled one.
        loss_mask: ``[T]`` bool, True where the policy sampled the token.
        logprobs: ``[T]`` float32, nats after temperature, of the engine when it sampled the token; 0 where not sampled.
        versions: ``[T]`` int32, policy version that sampled the token; -1 where not sampled.
        finish_reason: ``"stop"``, or ``"length"`` (limit of tokens or turns), or ``"failed"`` (the environment failed).
        text: the text that the reward function judges.
        turns: ``[turns]`` int32, index in ``response_ids`` at which each sampled turn starts.
        reward: given by the environment; ``None``: the reward function judges ``text``.
        rewards: named parts of the reward, for metrics.
        earlier: parts before a split. A split happens where a later turn's context does not begin with the sampled ids. Each part
            is trained as a sequence of its own with the same advantage.
        routed_experts: ``[P + T - 1, layers with experts, experts a token]`` uint8 or uint16: the engine's choice of experts for
            every token but the last, which does not go through the model. ``None``: not recorded.

    Raises:
        ValueError: a field has another shape or kind of numbers, or an earlier part has earlier parts itself.
    """

    prompt: Prompt
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    loss_mask: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    finish_reason: str
    text: str
    turns: np.ndarray
    reward: float | None = None
    rewards: dict[str, float] = field(default_factory=dict)
    earlier: tuple["Trajectory", ...] = ()
    routed_experts: np.ndarray | None = field(default=None, repr=False)

    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        length = len(self.response_ids)
        for name, dtype, expected in (
            ("prompt_ids", np.int32, None),
            ("response_ids", np.int32, None),
            ("loss_mask", np.bool_, length),
            ("logprobs", np.float32, length),
            ("versions", np.int32, length),
            ("turns", np.int32, None),
        ):
            array = as_vector(f"Trajectory.{name}", getattr(self, name), dtype, expected)
            object.__setattr__(self, name, array)
        experts = self.routed_experts
        if experts is not None and np.ndim(experts) != 3:
            raise ValueError(
                "Trajectory.routed_experts: expected shape [tokens - 1, layers, top_k], "
                f"got {list(np.shape(experts))}"
            )
        if any(part.earlier for part in self.earlier):
            raise ValueError("Trajectory.earlier: expected parts without earlier parts, got nested parts")

    @classmethod
    def single_turn(
        cls,
        prompt: Prompt,
        token_ids: ArrayLike,
        logprobs: ArrayLike,
        version: ArrayLike,
        finish_reason: str,
        text: str,
        routed_experts: np.ndarray | None = None,
    ) -> "Trajectory":
        """A trajectory whose response is one sampled turn.

        Args:
            prompt: its ``token_ids`` are the context.
            token_ids, logprobs: ``[T]``, of the sampled tokens.
            version: policy version of all tokens, or ``[T]`` of each token.
            finish_reason, text, routed_experts: see the attributes.
        """
        length = len(token_ids)
        return cls(
            prompt=prompt,
            prompt_ids=np.array(prompt.token_ids, np.int32),
            response_ids=token_ids,
            loss_mask=np.ones(length, np.bool_),
            logprobs=logprobs,
            versions=np.full(length, version, np.int32),
            finish_reason=finish_reason,
            text=text,
            turns=np.zeros(min(1, length), np.int32),
            routed_experts=routed_experts,
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trajectory):
            return NotImplemented
        for name in (f.name for f in fields(self) if f.name != "routed_experts"):
            one, two = getattr(self, name), getattr(other, name)
            if not (np.array_equal(one, two) if isinstance(one, np.ndarray) else one == two):
                return False
        return True

    def with_reward(self, reward: float | None) -> "Trajectory":
        """The same with the reward function's verdict; ``None``, a failed verifier, is NaN."""
        return replace(self, reward=float("nan") if reward is None else reward)

    @property
    def parts(self) -> tuple["Trajectory", ...]:
        """The sequences that are trained: ``earlier``, then the trajectory itself."""
        return (*self.earlier, self)

    @property
    def truncated(self) -> bool:
        """Whether the response reached the limit of tokens or turns."""
        return self.finish_reason == "length"

    @property
    def failed(self) -> bool:
        """Whether the environment failed: the one token stands for none and is not trained."""
        return self.finish_reason == "failed"

    @property
    def num_trained(self) -> int:
        """Sampled tokens of all ``parts``."""
        return sum(int(np.count_nonzero(part.loss_mask)) for part in self.parts)

    @property
    def num_tokens(self) -> int:
        """Tokens of all ``parts`` that go through the model, contexts included."""
        return sum(len(part.prompt_ids) + len(part.response_ids) for part in self.parts)
