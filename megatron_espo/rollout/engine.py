"""The trainer's side of a rollout engine: relays calls to its process, and knows what it may serve."""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_espo.errors import InputError
from megatron_espo.rollout.child import Child, launcher
from megatron_espo.rollout.config import EngineConfig
from megatron_espo.rollout.lifecycle import EngineError, State, transition
from megatron_espo.rollout.requests import Enough, Request, request_seeds
from megatron_espo.types import Prompt, Rollout

# A response: token ids, their log-probs (nats) after temperature, why it ended, and the experts of prompt and response (``Rollout.routed_experts``).
Sample = tuple[tuple[int, ...], tuple[float, ...], str, np.ndarray | None]

logger = logging.getLogger(__name__)


class Engine:
    """One vLLM engine, in a child process that dies with this one, or on one of ``config.hosts``. Not thread-safe; one call at a time.

    ``state`` is a ``lifecycle.State``; only a ready engine generates. ``restart`` brings a dead engine back to
    ``starting``; it must be connected (``make_trainer_transport``) and synced again.

    Implements vLLM's ``VLLMWeightSyncClient`` protocol, so that vLLM's transports drive it. A finished update is not
    served before ``serve``: in between it can be checked (``served_checksums``, ``canary``).

    Args:
        config: see ``EngineConfig``.
        decode: token ids of a response -> text (the trainer's tokenizer, without special tokens).
    """

    def __init__(self, config: EngineConfig, decode: Callable[[Sequence[int]], str]):
        self.config = config
        self.policy_version: int | None = None
        self.max_model_len: int | None = config.max_model_len
        self.state = State.DEAD
        self._decode = decode
        self._launch = launcher(config)
        self._child: Child | None = None
        self._next_version: int | None = None
        self._arrived_version: int | None = None

    # -- life -------------------------------------------------------------------------------------------------------

    def start(self) -> "Engine":
        """Start the child and return at once; ``wait_ready`` waits for it. Call it from the main thread."""
        following = transition(self.state, State.STARTING, "start")
        if not (Path(self.config.model) / "config.json").is_file():
            raise InputError(f"model.path: expected a Hugging Face folder with config.json, got {self.config.model!r}.")
        self.close()
        self._child = Child(self.config, self._launch())
        self.state = following
        return self

    def wait_ready(self, timeout: float | None = None) -> None:
        """Wait until the model is built (state ``stale``; ``ready`` with ``load_weights``). EngineError after ``timeout`` seconds (default: the
        configured one) or when the child dies."""
        if self.state == State.DEAD:
            raise EngineError("wait_ready: the rollout engine is not running; call start() or restart().", "start")
        if self.state == State.STARTING:
            limit = timeout or self.config.start_timeout_s
            self.max_model_len = self._guarded(self._child.receive, "start", limit)
            self._move(State.STALE, "wait_ready")
            if self.config.load_weights:
                self._move(State.READY, "wait_ready")
                self.policy_version = 0

    def restart(self) -> "Engine":
        """Close what is left of the child and start another; not waiting for it."""
        self.close()
        return self.start()

    def close(self) -> None:
        """End the child and whatever it started. Safe to call twice."""
        if self._child is not None:
            self._child.close()
        self._child = None
        self._move(State.DEAD, "close")

    @property
    def pid(self) -> int | None:
        """Process id of the child, which leads a process group of its own; ``None`` on another machine."""
        return self._child.pid if self._child is not None else None

    @property
    def own_address(self) -> str:
        """This machine's address as the running engine reaches it."""
        return self._child.own_address

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def sleep(self) -> None:
        """Give the GPU memory of weights and caches back and forget what was in it (vLLM's sleep level 2)."""
        transition(self.state, State.ASLEEP, "sleep")
        self._call("sleep")
        self._move(State.ASLEEP, "sleep")

    def wake(self, shapes: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        """Take memory for the weights again, and :meth:`poison` what happens to be in it: the engine is as stale as one that has just started.

        The memory of the caches comes back with the first call that decodes, when weights arrived and the trainer needs less of its own.
        """
        self._require(State.ASLEEP, "wake")
        self._call("wake")
        self._move(State.STALE, "wake")
        self.poison(shapes)

    # -- rollouts ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        *,
        seed: int | Sequence[Sequence[int | None]] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        sampling: dict[str, Any] | None = None,
        on_finished: Callable[[int, str], None] | None = None,
        begun: Sequence[Sequence[Rollout]] = (),
        enough: Enough | None = None,
    ) -> list[list[Rollout]]:
        """Sample ``group_size`` responses to each prompt.

        Args:
            prompts: given to the engine as token ids.
            group_size: responses a prompt.
            seed: makes every response a function of (seed, prompt id, position in its group), however the prompts are
                batched or spread over engines; give each training step its own. None: the engine's running generator. Or one for
                each response, by prompt (``request_seeds``).
            on_progress: called with (finished, total) responses, at least twice a second; what it raises ends the
                engine.
            sampling: ``temperature``, ``top_p``, ``top_k`` or ``max_tokens`` in place of the configuration's, for this call; with one of the first
                three it returns no routed experts.
            on_finished: called with each response's number (prompt x ``group_size`` + position) and text when it is finished, while
                others are not; needs a ``seed``.
            begun: rollouts of the first prompts, of which the unfinished ones are gone on with.
            enough: when to end without waiting for all; the rollouts of other prompts may be unfinished then.

        Returns:
            One list of ``group_size`` rollouts a prompt, in order; log-probs in nats.

        Raises:
            InputError: a prompt leaves no room for a response of ``max_response_tokens``.
            EngineError: the engine is not ready, died, finished no response for ``timeout_s`` seconds, or lost the response
                to a prompt twice.
        """
        self._require(State.READY, "generate")
        sampling = dict(sampling or {})
        limit = sampling.pop("max_tokens", self.config.max_response_tokens)
        self._check_lengths(prompts, limit)
        seeds = sum(request_seeds(prompts, group_size, seed) if seed is None or isinstance(seed, int) else seed, [])
        rollouts = [rollout for group in begun for rollout in group]
        rollouts += [Rollout(prompt, (), (), "unfinished", -1, "") for prompt in prompts[len(begun) :] for _ in range(group_size)]
        numbers = [number for number, rollout in enumerate(rollouts) if rollout.unfinished]
        by_seed = {seeds[number]: number for number in numbers}

        def tell(finished: list[tuple[int, tuple[int, ...]]]) -> None:
            for request_seed, ids in finished:
                number = by_seed[request_seed]
                on_finished(number, self._decode(rollouts[number].response_ids + ids))

        requests = [
            Request(rollouts[n].prompt.token_ids + rollouts[n].response_ids, seeds[n], limit - len(rollouts[n].response_ids), n // group_size)
            for n in numbers
        ]
        samples = self._sample(requests, [rollouts[n].prompt.id for n in numbers], sampling, enough, on_progress, on_finished and tell)
        for number, sample in zip(numbers, samples, strict=True):
            rollouts[number] = self._longer(rollouts[number], sample)
        return [rollouts[i : i + group_size] for i in range(0, len(rollouts), group_size)]

    def _longer(self, rollout: Rollout, sample: Sample) -> Rollout:
        """``rollout`` with what was sampled after it."""
        ids, logprobs, reason, experts = sample
        if not all(map(math.isfinite, logprobs)):
            raise EngineError(f"generate: a log-prob for prompt {rollout.prompt.id!r} is not finite.")
        version = rollout.policy_version if rollout.response_ids else self.policy_version
        ids = rollout.response_ids + ids
        text = "" if reason == "unfinished" else self._decode(ids)
        return Rollout(rollout.prompt, ids, rollout.logprobs + logprobs, reason, version, text, _joined(rollout.routed_experts, experts))

    def _sample(
        self,
        requests: list[Request],
        names: list[str],
        sampling: dict[str, Any],
        enough: Enough | None,
        on_progress: Callable | None,
        tell: Callable | None,
    ) -> list[Sample]:
        """A sample for each request; a lost one is asked for once more."""
        samples: list[Sample | None] = self._call("generate", requests, sampling, bool(tell), enough, on_progress=on_progress, on_finished=tell)
        lost = [i for i, sample in enumerate(samples) if sample is None]
        if lost:
            logger.warning("%d of %d responses never came back (prompt %r); asking again", len(lost), len(samples), names[lost[0]])
            missing = [requests[i] for i in lost]
            again = self._call("generate", missing, sampling, bool(tell), on_progress=on_progress, on_finished=tell)
            for i, sample in zip(lost, again, strict=True):
                samples[i] = sample
        lost_twice = sorted({names[i] for i in lost if samples[i] is None})
        if lost_twice:
            raise EngineError(f"generate: the rollout engine lost the responses to {len(lost_twice)} prompts twice: {', '.join(lost_twice[:5])}")
        return samples

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs (nats, temperature 1) of tokens 1, 2, ... of each sequence given those before: one forward pass.

        Raises:
            EngineError: as ``generate``.
        """
        self._require(State.READY, "logprobs")
        return self._call("logprobs", [tuple(sequence) for sequence in sequences])

    def _check_lengths(self, prompts: Sequence[Prompt], max_response_tokens: int) -> None:
        for prompt in prompts:
            length = len(prompt.token_ids) + max_response_tokens
            if not prompt.token_ids or length > self.max_model_len:
                raise InputError(
                    f"Prompt {prompt.id!r} has {len(prompt.token_ids)} tokens: expected at least 1, and with "
                    f"max_response_tokens={max_response_tokens} at most "
                    f"rollout.max_model_len={self.max_model_len}. Filter long prompts or raise rollout.max_model_len."
                )

    # -- weights: vLLM's VLLMWeightSyncClient, and what happens before and after it -----------------------------------

    def announce_version(self, version: int) -> None:
        """The policy version that the next finished update brings."""
        self._next_version = version

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.wait_ready()
        self._call("init_weight_transfer_engine", init_info)

    def poison(self, shapes: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        """Load NaN into every named weight, so that what a sync does not bring cannot look right."""
        self.wait_ready()
        self._require(State.STALE, "poison")
        self._call("poison", list(shapes))

    def start_weight_update(self) -> None:
        """Open an update; the engine serves nothing from here to ``serve``."""
        self._move(State.UPDATING, "start_weight_update")
        self._call("start_weight_update")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._require(State.UPDATING, "update_weights")
        self._call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Close the update and reset the prefix cache; ``weight_version`` defaults to the announced one.

        Raises:
            EngineError: weights did not arrive, or no version was announced.
        """
        self._require(State.UPDATING, "finish_weight_update")
        version = self._next_version if weight_version is None else int(weight_version)
        if version is None:
            raise EngineError("finish_weight_update: announce_version was not called for this update.", "finish")
        self._call("finish_weight_update", version)
        self._arrived_version = version

    def served_checksums(self, dtype: str) -> dict[str, int]:
        """Checksum of each Hugging Face tensor as vLLM's kernels hold it now, read back and un-fused.

        Args:
            dtype: of the tensors that were sent; see ``checksum.tensor_checksum``.

        Returns:
            Tensors that vLLM holds in a form that cannot be read back are absent.
        """
        self._require_arrived("served_checksums")
        return self._call("served_checksums", dtype)

    def canary(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Sample]:
        """Sample ``num_tokens`` tokens after each prompt from the weights that just arrived, before they are served.

        At the rollouts' temperature, never truncated (top-p, top-k), with a fixed seed; the tokens go through decode.
        """
        self._require_arrived("canary")
        return self._call("canary", [tuple(prompt) for prompt in prompts], num_tokens)

    def transfer_seconds(self) -> dict[str, float]:
        """Seconds that the first worker spent in each part of the last update; empty for transports of vLLM's own."""
        return self._call("transfer_seconds")

    def serve(self) -> None:
        """Serve the policy version that has arrived."""
        self._require_arrived("serve")
        self._move(State.READY, "serve")
        self.policy_version, self._next_version = self._arrived_version, None

    def reject(self) -> None:
        """Give up an update. A finished one leaves the engine stale; one halfway kills it, because vLLM's layers are
        half replaced then and refuse another."""
        if self.state == State.UPDATING:
            if self._arrived_version is None:
                self.close()
            else:
                self._move(State.STALE, "reject")

    def _require_arrived(self, action: str) -> None:
        self._require(State.UPDATING, action)
        if self._arrived_version is None:
            raise EngineError(f"{action}: the weight update is not finished.")

    # -- the wire ---------------------------------------------------------------------------------------------------

    def _require(self, state: State, action: str) -> None:
        if self.state != state:
            served = "it serves only after a weight sync" if state == State.READY else f"expected {state}"
            raise EngineError(f"{action}: the rollout engine is {self.state}; {served}.")

    def _move(self, state: State, action: str) -> None:
        self.state = transition(self.state, state, action)
        if state != State.READY:
            self.policy_version = self._arrived_version = None

    def _call(
        self, method: str, *args: Any, on_progress: Callable[[int, int], None] | None = None, on_finished: Callable | None = None
    ) -> Any:
        if self.state == State.DEAD:
            raise EngineError(f"{method}: the rollout engine is not running; restart it and sync its weights.")
        return self._guarded(self._child.call, method, args, self.config.timeout_s, on_progress, on_finished)

    def _guarded(self, call: Callable, *args: Any) -> Any:
        """Whatever the child's call raises, the child is dead then."""
        try:
            return call(*args)
        except BaseException:
            self._move(State.DEAD, "failure")
            raise


def _joined(earlier: np.ndarray | None, now: np.ndarray | None) -> np.ndarray | None:
    """Experts of a response that was gone on with: those with which each token was drawn, though the engine has chosen again for all of them."""
    if earlier is None or now is None:
        return earlier if now is None else now
    return np.concatenate([earlier, now[len(earlier) :]])
