"""Values that the stages pass to each other. Plain data: the standard library and numpy only."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike


@dataclass(frozen=True)
class Prompt:
    """One row of the prompt source.

    Attributes:
        id: unique within the prompt source, stable over epochs and restarts.
        text: the prompt as rendered for the model (chat template applied).
        answer: the value that the reward function compares with.
        token_ids: ``text`` as the trainer's tokenizer encodes it. The rollout engine receives
            these ids, never text.
        metadata: values that the prompt source adds (a reasoning-gym entry, extra columns).
        source: name in ``data.mixture``; empty without a mixture.
    """

    id: str
    text: str
    answer: str
    token_ids: tuple[int, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    source: str = ""


def as_vector(
    name: str, values: ArrayLike, dtype: DTypeLike, length: int | None = None
) -> np.ndarray:
    """Convert ``values`` to a one-dimensional array. Copies only to change the dtype.

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
class SamplingMask:
    """The token ids that top-k and top-p kept at each of ``T`` tokens. No other id had a
    probability. ``mask[chosen]`` takes a slice or a bool array ``[T]``.

    Attributes:
        ids: int32, the ids kept for the first token, then those for the second, and so on.
        counts: ``[T]`` int32, number of ids of each token; 0 for a token that was not sampled.

    Raises:
        ValueError: the counts do not add up to the number of ids.
    """

    ids: np.ndarray
    counts: np.ndarray

    def __post_init__(self) -> None:
        for name in ("ids", "counts"):
            values = as_vector(f"SamplingMask.{name}", getattr(self, name), np.int32)
            object.__setattr__(self, name, values)
        if self.counts.sum() != len(self.ids):
            expected = f"{self.counts.sum()} ids"
            raise ValueError(f"SamplingMask: expected {expected}, got {len(self.ids)}")

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, chosen: Any) -> "SamplingMask":
        keep = np.zeros(len(self), np.bool_)
        keep[chosen] = True
        return SamplingMask(self.ids[keep.repeat(self.counts)], self.counts[keep])

    @staticmethod
    def empty(length: int) -> "SamplingMask":
        """The mask of ``length`` tokens that were not sampled."""
        return SamplingMask(np.zeros(0, np.int32), np.zeros(length, np.int32))

    @staticmethod
    def concatenate(masks: Sequence["SamplingMask | None"]) -> "SamplingMask | None":
        """Join masks; ``None`` if one is unknown."""
        known = [mask for mask in masks if mask is not None]
        if not known or len(known) < len(masks):
            return None
        names = ("ids", "counts")
        return SamplingMask(*(np.concatenate([getattr(m, n) for m in known]) for n in names))


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One sampled response of one or several turns, with the exact tokens of the engine.

    ``T`` is the length of ``response_ids``.

    Attributes:
        prompt: the prompt that it answers.
        prompt_ids: ``[P]`` int32, the context before the first sampled token (with one turn:
            ``prompt.token_ids``).
        response_ids: ``[T]`` int32, all tokens after ``prompt_ids``: sampled tokens and, between
            turns, the environment's. A sampled end-of-sequence token is part of them.
        loss_mask: ``[T]`` bool, True where the policy sampled the token.
        logprobs: ``[T]`` float32, nats after temperature, of the engine when it sampled the token;
            0 where not sampled.
        versions: ``[T]`` int32, policy version that sampled the token; -1 where not sampled.
        finish_reason: ``"stop"``, ``"length"`` (limit of tokens or turns) or ``"failed"`` (the
            environment failed).
        text: the text that the reward function scores.
        turns: ``[turns]`` int32, index in ``response_ids`` at which each sampled turn starts.
        reward: any number, kept as a float. NaN: scoring failed; ``None``: not scored yet.
        rewards: named parts of the reward, for metrics; floats too.
        earlier: parts before a split. A split happens where the context of a turn does not begin
            with the ids sampled so far. Each part is a training sequence with the same advantage.
        routed_experts: ``[P + T - 1, layers with experts, experts a token]`` uint8 or uint16: the
            experts that the engine chose for every token but the last, which does not go through
            the model. ``None``: not recorded.
        sampling_mask: of ``response_ids``; ``None``: the engine sampled from the whole vocabulary.

    Raises:
        ValueError, TypeError: a field has another shape or kind of numbers, or ``earlier`` is
            nested.
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
    sampling_mask: SamplingMask | None = field(default=None, repr=False)

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
        if self.reward is not None:
            object.__setattr__(self, "reward", float(self.reward))
        rewards = {name: float(value) for name, value in self.rewards.items()}
        object.__setattr__(self, "rewards", rewards)
        if self.routed_experts is not None and np.ndim(self.routed_experts) != 3:
            shape = list(np.shape(self.routed_experts))
            wanted = "expected shape [tokens - 1, layers, top_k]"
            raise ValueError(f"Trajectory.routed_experts: {wanted}, got {shape}")
        if self.sampling_mask is not None:
            as_vector("Trajectory.sampling_mask", self.sampling_mask.counts, np.int32, length)
        if any(part.earlier for part in self.earlier):
            raise ValueError("Trajectory.earlier: expected a flat list, got nested parts")

    def with_reward(self, reward: float | None) -> "Trajectory":
        """Return a copy with the reward function's score. ``None`` (scoring failed) becomes NaN."""
        return replace(self, reward=float("nan") if reward is None else reward)

    @property
    def parts(self) -> tuple["Trajectory", ...]:
        """The training sequences: ``earlier``, then the trajectory itself."""
        return (*self.earlier, self)

    @property
    def truncated(self) -> bool:
        """Whether the response reached the limit of tokens or turns."""
        return self.finish_reason == "length"

    @property
    def failed(self) -> bool:
        """Whether the environment failed. Its single token is a placeholder and is not trained."""
        return self.finish_reason == "failed"

    @property
    def num_trained(self) -> int:
        """Sampled tokens of all ``parts``."""
        return sum(int(np.count_nonzero(part.loss_mask)) for part in self.parts)
