"""The trainer's side of a rollout engine: starts the child process, relays calls to it, knows what it may serve."""

import hashlib
import math
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_espo.errors import InputError
from megatron_espo.types import Prompt, Rollout

_POLL_SECONDS = 0.5
_CLOSE_SECONDS = 5.0
_LOG_LINES = 20


class EngineError(RuntimeError):
    """The rollout engine died, hung, refused a call, or was asked for something its state forbids."""


@dataclass(frozen=True)
class EngineConfig:
    """What a rollout engine is started with.

    Attributes:
        model: Hugging Face folder; its weights are not read, the first sync brings them.
        log_path: file that receives the output of vLLM.
        dtype: ``float32`` or ``bfloat16``.
        transport: vLLM's weight transfer backend: ``shared_memory``, ``ipc`` or ``nccl``.
        max_model_len: tokens of prompt and response together; None: the model's context.
        max_response_tokens: a response is cut off there.
        eos_ids: token ids that end a response (the token is part of the response).
        temperature, top_p, top_k: of sampling; the returned log-probs are those after these three.
        seed: of the engine; ``generate`` takes seeds of its own.
        tensor_parallel_size: GPUs (or CPU processes) of this engine.
        gpu_memory_utilization: fraction of each GPU's memory that vLLM may take.
        cpu_kv_cache_gib: size of the key/value cache on CPU (GiB).
        timeout_s: a call fails after so many seconds without news (in ``generate``: without a finished response).
        start_timeout_s: the same for loading vLLM and building the model.
        visible_devices: CUDA_VISIBLE_DEVICES of the child; None: inherited.
    """

    model: str
    log_path: str
    dtype: str
    transport: str
    max_response_tokens: int
    eos_ids: frozenset[int]
    max_model_len: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.5
    cpu_kv_cache_gib: float = 1.0
    timeout_s: float = 600.0
    start_timeout_s: float = 600.0
    visible_devices: str | None = None


class Engine:
    """One vLLM engine in a child process that dies with this one. Not thread-safe; one call at a time.

    ``state``: ``starting`` -> ``stale`` (no weights yet) -> ``updating`` -> ``ready``; ``dead`` after an error, a
    timeout or ``close``. Only a ready engine generates. ``restart`` brings a dead engine back to ``starting``; it must
    be connected (``make_trainer_transport``) and synced again.

    Implements vLLM's ``VLLMWeightSyncClient`` protocol, so that vLLM's transports drive it.

    Args:
        config: see ``EngineConfig``.
        decode: token ids of a response -> text (the trainer's tokenizer, without special tokens).
    """

    def __init__(self, config: EngineConfig, decode: Callable[[Sequence[int]], str]):
        self.config = config
        self.policy_version: int | None = None
        self.max_model_len: int | None = config.max_model_len
        self.state = "dead"
        self._decode = decode
        self._process: subprocess.Popen | None = None
        self._connection: multiprocessing.connection.Connection | None = None
        self._next_version: int | None = None

    # -- life -------------------------------------------------------------------------------------------------------

    def start(self) -> "Engine":
        """Start the child and return at once; ``wait_ready`` waits for it.

        Call it from the main thread: Linux kills the child when the thread that started it ends.
        """
        if self.state != "dead":
            raise EngineError(f"start: the rollout engine runs already (state {self.state}).")
        if not (Path(self.config.model) / "config.json").is_file():
            raise InputError(f"model.path: expected a Hugging Face folder with config.json, got {self.config.model!r}.")
        ours, theirs = socket.socketpair()
        with theirs, open(self.config.log_path, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_espo.rollout.server", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=child_environment(self.config),
                start_new_session=True,
            )
        self._connection = multiprocessing.connection.Connection(ours.detach())
        self.state = "starting"
        self._send("start", self.config)
        return self

    def wait_ready(self, timeout: float | None = None) -> None:
        """Wait until the model is built (state ``stale``). EngineError after ``timeout`` seconds (default: the
        configured one) or when the child dies."""
        if self.state == "starting":
            self.max_model_len = self._receive("start", timeout or self.config.start_timeout_s)
            self.state = "stale"
        elif self.state == "dead":
            raise EngineError("wait_ready: the rollout engine is not running; call start() or restart().")

    def restart(self) -> "Engine":
        """Close what is left of the child and start another; not waiting for it."""
        self.close()
        return self.start()

    def close(self) -> None:
        """End the child: politely, then SIGTERM, then SIGKILL to its process group. Safe to call twice."""
        if self._process is None:
            return
        if self.state != "dead" and self._process.poll() is None:
            try:
                self._connection.send(("close", ()))
                self._process.wait(_CLOSE_SECONDS)
            except (OSError, subprocess.TimeoutExpired):
                pass
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                self._signal_group(signal_number)
                try:
                    self._process.wait(_CLOSE_SECONDS)
                except subprocess.TimeoutExpired:
                    pass
        # Tensor-parallel workers of a dead engine process are in its group too.
        self._signal_group(signal.SIGKILL)
        self._connection.close()
        self._process, self.state, self.policy_version = None, "dead", None

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    # -- rollouts ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        *,
        seed: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Rollout]]:
        """Sample ``group_size`` responses to each prompt.

        Args:
            prompts: given to the engine as token ids.
            group_size: responses a prompt.
            seed: makes every response a function of (seed, prompt id, position in its group), however the prompts are
                batched or spread over engines; give each training step its own. None: the engine's running generator.
            on_progress: called with (finished, total) responses, at least twice a second; what it raises ends the
                engine.

        Returns:
            One list of ``group_size`` rollouts a prompt, in order; log-probs in nats.

        Raises:
            InputError: a prompt leaves no room for a response of ``max_response_tokens``.
            EngineError: the engine is not ready, died, or finished no response for ``timeout_s`` seconds.
        """
        if self.state != "ready":
            raise EngineError(f"generate: the rollout engine is {self.state}; it serves only after a weight sync.")
        self._check_lengths(prompts)
        requests = [
            (prompt.token_ids, request_seed)
            for prompt, seeds in zip(prompts, request_seeds(prompts, group_size, seed), strict=True)
            for request_seed in seeds
        ]
        samples = self._call("generate", requests, on_progress=on_progress)
        rollouts = [
            Rollout(prompts[i // group_size], ids, logprobs, reason, self.policy_version, self._decode(ids))
            for i, (ids, logprobs, reason) in enumerate(samples)
        ]
        for rollout in rollouts:
            if not all(map(math.isfinite, rollout.logprobs)):
                raise EngineError(f"generate: a log-prob for prompt {rollout.prompt.id!r} is not finite.")
        return [rollouts[i : i + group_size] for i in range(0, len(rollouts), group_size)]

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs (nats, temperature 1) of tokens 1, 2, ... of each sequence given those before: one forward pass.

        Raises:
            EngineError: as ``generate``.
        """
        if self.state != "ready":
            raise EngineError(f"logprobs: the rollout engine is {self.state}; it serves only after a weight sync.")
        return self._call("logprobs", [tuple(sequence) for sequence in sequences])

    def _check_lengths(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            length = len(prompt.token_ids) + self.config.max_response_tokens
            if not prompt.token_ids or length > self.max_model_len:
                raise InputError(
                    f"Prompt {prompt.id!r} has {len(prompt.token_ids)} tokens: expected at least 1, and with "
                    f"rollout.max_response_tokens={self.config.max_response_tokens} at most "
                    f"rollout.max_model_len={self.max_model_len}. Filter long prompts or raise rollout.max_model_len."
                )

    # -- weights: vLLM's VLLMWeightSyncClient ---------------------------------------------------------------------

    def announce_version(self, version: int) -> None:
        """The policy version that the next finished update brings (default: one more than the last)."""
        self._next_version = version

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.wait_ready()
        self._call("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        """Open an update; the engine serves nothing until it is finished."""
        self._call("start_weight_update")
        self.state = "updating"

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Close the update, reset the prefix cache, and serve the new policy version."""
        if weight_version is None:
            following = 0 if self.policy_version is None else self.policy_version + 1
            version = following if self._next_version is None else self._next_version
        else:
            version = int(weight_version)
        self._call("finish_weight_update", version)
        self.policy_version, self._next_version, self.state = version, None, "ready"

    # -- the wire ---------------------------------------------------------------------------------------------------

    def _call(self, method: str, *args: Any, on_progress: Callable[[int, int], None] | None = None) -> Any:
        if self.state == "dead":
            raise EngineError(f"{method}: the rollout engine is not running; restart it and sync its weights.")
        self._send(method, *args)
        return self._receive(method, self.config.timeout_s, on_progress)

    def _send(self, method: str, *args: Any) -> None:
        try:
            self._connection.send((method, args))
        except OSError:
            raise self._failed(method, "has died") from None

    def _receive(self, method: str, timeout: float, on_progress: Callable[[int, int], None] | None = None) -> Any:
        """The answer to ``method``. Every way out but an answer leaves the engine dead: its state is unknown then."""
        progress, deadline = (0, 0), time.monotonic() + timeout
        try:
            while time.monotonic() < deadline:
                if self._connection.poll(min(_POLL_SECONDS, timeout)):
                    kind, payload = self._connection.recv()
                    if kind == "result":
                        return payload
                    if kind == "error":
                        raise self._failed(method, f"failed: {payload}")
                    progress, deadline = payload, time.monotonic() + timeout
                elif self._process.poll() is not None:
                    raise EOFError
                if on_progress is not None:
                    on_progress(*progress)
        except (EOFError, ConnectionError):
            raise self._failed(method, "has died") from None
        except EngineError:
            raise
        except BaseException:
            self._abandon()
            raise
        raise self._failed(method, f"gave no news for {timeout:g} s (rollout.timeout_s)")

    def _failed(self, method: str, what: str) -> EngineError:
        process = self._process
        self._abandon()
        code = process.returncode
        end = "" if code in (None, 0, -signal.SIGKILL) else f" (exit code {code})"
        log = f"Last lines of {self.config.log_path}:\n{self.log_tail()}"
        return EngineError(f"{method}: the rollout engine {what}{end}.\n{log}")

    def _abandon(self) -> None:
        """Kill the child at once."""
        try:
            self._process.wait(0.2)  # an exit code of its own tells more than our signal
        except subprocess.TimeoutExpired:
            pass
        self._signal_group(signal.SIGKILL)
        self._process.wait()
        self.state, self.policy_version = "dead", None

    def _signal_group(self, signal_number: int) -> None:
        try:
            os.killpg(self._process.pid, signal_number)  # the child leads a session of its own
        except ProcessLookupError:
            pass

    def log_tail(self) -> str:
        """The last lines that the child wrote."""
        with open(self.config.log_path, "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - 16384))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-_LOG_LINES:])


def request_seeds(prompts: Sequence[Prompt], group_size: int, seed: int | None) -> list[list[int | None]]:
    """A 63-bit seed for each response: a hash of (seed, prompt id, occurrence of that id, position in the group)."""
    if seed is None:
        return [[None] * group_size for _ in prompts]
    seen: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        key = f"{seed}:{prompt.id}:{seen[prompt.id]}"
        seen[prompt.id] += 1
        digests = (hashlib.blake2b(f"{key}:{j}".encode(), digest_size=8).digest() for j in range(group_size))
        seeds.append([int.from_bytes(digest, "little") >> 1 for digest in digests])
    return seeds


_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")
_TORCHRUN_PREFIXES = ("MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "PET_")


def child_environment(config: EngineConfig) -> dict[str, str]:
    """This process's environment without what torchrun added, and with what vLLM needs before it is imported."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in _TORCHRUN and not key.startswith(_TORCHRUN_PREFIXES)
    }
    environment.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine core lives in the child, which is process enough
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        PYTHONUNBUFFERED="1",
    )
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0))
        environment["OMP_NUM_THREADS"] = str(max(1, cores // config.tensor_parallel_size))
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # vLLM binds one worker to one NUMA node, or refuses
        # The trainer's processes share these cores: waiting threads that spin made generation 10 times slower.
        environment["OMP_WAIT_POLICY"] = "passive"
    package_root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, environment.get("PYTHONPATH")]))
    if config.visible_devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = config.visible_devices
    return environment
