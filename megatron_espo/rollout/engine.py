"""What a rollout engine is for the rest of the project: its protocol, its states, its errors. No vLLM here."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Protocol

import numpy as np


class Phase(StrEnum):
    """What an engine was doing when it failed."""

    START = "start"
    CONNECT = "connect"
    ROLLOUT = "rollout"
    SLEEP = "sleep"
    WAKE = "wake"
    TRANSFER = "transfer"
    LOAD = "load"
    FINISH = "finish"
    VERIFY = "verify"
    CANARY = "canary"


class EngineError(RuntimeError):
    """An engine died, hung, refused a call, or was asked for something that its state forbids.

    Attributes:
        phase: what was going on.
        final: another attempt would fail in the same way.
    """

    def __init__(self, message: str, phase: Phase = Phase.ROLLOUT, final: bool = False) -> None:
        super().__init__(message)
        self.phase, self.final = phase, final

    def __reduce__(self) -> tuple:
        return EngineError, (str(self), self.phase, self.final)


class State(StrEnum):
    """What an engine can do next. Only a ``ready`` engine serves rollouts."""

    STARTING = "starting"  # vLLM loads
    STALE = "stale"  # it runs, without weights that may be served
    UPDATING = "updating"  # weights arrive or are checked
    READY = "ready"
    ASLEEP = "asleep"  # it gave its GPU memory back; it wakes ``stale``
    DEAD = "dead"  # no process


TRANSITIONS = {
    State.DEAD: {State.STARTING, State.DEAD},
    State.STARTING: {State.STALE, State.DEAD},
    State.STALE: {State.UPDATING, State.READY, State.ASLEEP, State.DEAD},
    State.UPDATING: {State.READY, State.STALE, State.DEAD},
    State.READY: {State.UPDATING, State.ASLEEP, State.DEAD},
    State.ASLEEP: {State.STALE, State.DEAD},
}


def check_transition(current: State, following: State, action: str) -> None:
    """EngineError where ``action``, which leads to ``following``, is not possible in the ``current`` state."""
    if following not in TRANSITIONS[current]:
        allowed = " or ".join(state for state in State if following in TRANSITIONS[state])
        raise EngineError(f"{action}: the rollout engine is {current}; expected {allowed}.")


@dataclass(frozen=True)
class Sampling:
    """How one response is sampled; the fields of vLLM's ``SamplingParams`` that differ between requests.

    Attributes:
        max_tokens: most tokens to sample.
        seed: 63 bits; ``None``: the engine's running generator.
        stop_token_ids: ids that end the response; the id is part of it.
    """

    max_tokens: int
    seed: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()

    def as_json(self) -> dict[str, Any]:
        # The trainer's tokenizer, not the model's folder, says what ends a response.
        return asdict(self) | {"stop_token_ids": list(self.stop_token_ids), "ignore_eos": True}


@dataclass(frozen=True, eq=False)
class Generation:
    """Sampled tokens.

    Attributes:
        token_ids: int32 ``[tokens]``.
        logprobs: float32 ``[tokens]``, nats, after temperature, top-p and top-k.
        versions: int32 ``[tokens]``, policy version that sampled each token.
        finish_reason: ``stop``, ``length`` or ``abort``.
        routed_experts: ``[context + tokens - 1, layers with experts, experts a token]``; ``None``: not asked for.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    finish_reason: str
    routed_experts: np.ndarray | None = None


class TokenSource(Protocol):
    """What answers requests for tokens: one server, or a pool of servers."""

    async def generate(
        self, request_id: str, token_ids: Sequence[int], sampling: Sampling, *, slot: int = 0, routed_experts: bool = False
    ) -> Generation:
        """Sample after ``token_ids``. Requests with the same ``slot`` go to the same server, which shares their prefix."""


class RolloutEngine(Protocol):
    """One engine, as the rank that owns it controls it. Calls block; a failed call kills the engine (state ``dead``).

    It is also the client that vLLM's weight transports drive (``VLLMWeightSyncClient``): ``init_weight_transfer_engine``,
    ``start_weight_update``, ``update_weights``, ``finish_weight_update``.

    Attributes:
        state: see :class:`State`.
        policy_version: version that is served; ``None``: none.
        address: where its server listens.
    """

    state: State
    policy_version: int | None
    address: str

    def start(self) -> None:
        """Start a server and return at once. Call it from the main thread."""

    def wait_ready(self) -> None:
        """Wait until the model is built."""

    def close(self) -> None:
        """End the server and its workers. Safe to call twice."""

    def pause(self) -> None:
        """Freeze the requests in flight until ``resume``."""

    def resume(self) -> None:
        """Let requests go on; keys and values that older weights computed are computed again."""

    def sleep(self) -> None:
        """Abort the requests in flight and give the GPU memory of weights and caches back."""

    def wake(self, shapes: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        """Take memory for the weights again and fill it with NaN."""

    def fill_nan(self, shapes: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        """Load NaN into every named weight, so that weights that an update does not bring cannot look right."""

    def read_back_checksums(self, dtype: str) -> dict[str, int]:
        """``tensor_checksum`` of each tensor as the engine's kernels hold it."""

    def canary(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Generation]:
        """Sample from weights that arrived and are not served yet."""

    def serve(self) -> None:
        """Serve the weights that arrived."""

    def reject(self) -> None:
        """Give up an update."""

    def check_health(self) -> None:
        """EngineError unless every worker answers."""
