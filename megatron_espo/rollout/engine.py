"""States, errors, requests and replies of rollout engines. Does not import vLLM."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatron_espo.config import Rollout
from megatron_espo.types import SamplingMask

# "running": the server's model is built. "asleep": its GPU memory is released.
State = Literal["dead", "starting", "running", "asleep"]


class EngineError(RuntimeError):
    """An engine died, hung or refused a call, or its state does not allow the call.

    Attributes:
        final: a retry would fail in the same way.
    """

    def __init__(self, message: str, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class WrongKeyError(EngineError):
    """A server has another key (HTTP status 401)."""


@dataclass(frozen=True)
class Sampling:
    """How to sample one response; most names are those of vLLM's ``SamplingParams``.

    Attributes:
        max_tokens: limit of sampled tokens.
        seed: 63 bits; ``None``: the engine's global generator.
        stop_token_ids: a response ends with the first of these ids, which it includes.
        slot: one server gets all requests of a slot, so they share cached prefixes.
        routed_experts: whether to return the experts of each token.
    """

    max_tokens: int
    seed: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    slot: int = 0
    routed_experts: bool = False

    @classmethod
    def of(cls, rollout: Rollout, eos_ids: Iterable[int]) -> "Sampling":
        """How a run samples; ``eos_ids`` end a response."""
        limits = {name: getattr(rollout, name) for name in ("temperature", "top_p", "top_k")}
        return cls(rollout.max_response_tokens, stop_token_ids=tuple(sorted(eos_ids)), **limits)

    def as_json(self) -> dict[str, Any]:
        """vLLM's ``SamplingParams`` as its JSON API expects them."""
        names = ("max_tokens", "seed", "temperature", "top_p", "top_k", "stop_token_ids")
        # stop_token_ids comes from the trainer's tokenizer, so vLLM ignores the model's own EOS.
        return {name: getattr(self, name) for name in names} | {"ignore_eos": True}


@dataclass(frozen=True, eq=False)
class Generation:
    """Sampled tokens.

    Attributes:
        token_ids: int32 ``[tokens]``.
        logprobs: float32 ``[tokens]``, nats, after temperature, top-p and top-k.
        versions: int32 ``[tokens]``, the policy version that sampled each token.
        finish_reason: ``stop``, ``length`` or ``abort``.
        routed_experts: ``[context + tokens - 1, layers with experts, experts per token]``;
            ``None``: not requested.
        sampling_mask: of ``token_ids``; ``None``: not recorded.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    finish_reason: str
    routed_experts: np.ndarray | None = None
    sampling_mask: SamplingMask | None = None


# Fields of ``Generation`` with one value for each token.
TOKEN_FIELDS = ("token_ids", "logprobs", "versions")
