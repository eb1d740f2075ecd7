"""The process of a rollout engine and the socket to it."""

import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_espo.rollout.config import EngineConfig
from megatron_espo.rollout.lifecycle import EngineError

_POLL_SECONDS = 0.5
_CLOSE_SECONDS = 5.0
_LOG_LINES = 20
# Phases of the calls that are not rollouts.
_PHASES = {
    "start": "start",
    "init_weight_transfer_engine": "connect",
    "poison": "connect",
    "sleep": "sleep",
    "wake": "wake",
    "start_weight_update": "transfer",
    "update_weights": "load",
    "finish_weight_update": "finish",
    "served_checksums": "verify",
    "canary": "canary",
}


class Child:
    """One engine process that dies with this one. Any failure kills it: what state it is in is unknown then.

    Create it in the main thread: Linux kills the child when the thread that started it ends.
    """

    def __init__(self, config: EngineConfig):
        self._log_path = config.log_path
        ours, theirs = socket.socketpair()
        with theirs, open(config.log_path, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_espo.rollout.server", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=child_environment(config),
                start_new_session=True,
            )
        self.pid = self._process.pid
        self._connection = multiprocessing.connection.Connection(ours.detach())

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def call(
        self,
        method: str,
        args: tuple,
        timeout: float,
        on_progress: Callable[[int, int], None] | None = None,
        on_finished: Callable[[list], None] | None = None,
    ) -> Any:
        """Answer of the child. EngineError when it refuses, dies, or gives no news for ``timeout`` seconds."""
        self.send(method, args)
        return self.receive(method, timeout, on_progress, on_finished)

    def send(self, method: str, args: tuple) -> None:
        try:
            self._connection.send((method, args))
        except OSError:
            raise self._failed(method, "has died") from None

    def receive(
        self,
        method: str,
        timeout: float,
        on_progress: Callable[[int, int], None] | None = None,
        on_finished: Callable[[list], None] | None = None,
    ) -> Any:
        progress, deadline = (0, 0), time.monotonic() + timeout
        try:
            while time.monotonic() < deadline:
                if self._connection.poll(min(_POLL_SECONDS, timeout)):
                    kind, payload = self._connection.recv()
                    if kind == "result":
                        return payload
                    if kind == "error":
                        raise self._failed(method, f"failed: {payload}")
                    deadline = time.monotonic() + timeout
                    if kind == "finished":
                        on_finished(payload)
                    else:
                        progress = payload
                elif not self.is_alive:
                    raise EOFError
                if on_progress is not None:
                    on_progress(*progress)
        except (EOFError, ConnectionError):
            raise self._failed(method, "has died") from None
        except EngineError:
            raise
        except BaseException:
            self.kill()
            raise
        raise self._failed(method, f"gave no news for {timeout:g} s (rollout.timeout_s)")

    def close(self) -> None:
        """End the child: politely, then SIGTERM, then SIGKILL to its process group."""
        if self.is_alive:
            try:
                self._connection.send(("close", ()))
                self._process.wait(_CLOSE_SECONDS)
            except (OSError, subprocess.TimeoutExpired):
                pass
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            if self.is_alive:
                self._signal_group(signal_number)
                try:
                    self._process.wait(_CLOSE_SECONDS)
                except subprocess.TimeoutExpired:
                    pass
        # Tensor-parallel workers of a dead engine process are in its group too.
        self._signal_group(signal.SIGKILL)
        self._connection.close()

    def kill(self) -> None:
        """Kill the child and its workers at once."""
        try:
            self._process.wait(0.2)  # an exit code of its own tells more than our signal
        except subprocess.TimeoutExpired:
            pass
        self._signal_group(signal.SIGKILL)
        self._process.wait()

    def _failed(self, method: str, what: str) -> EngineError:
        self.kill()
        code = self.returncode
        end = "" if code in (None, 0, -signal.SIGKILL) else f" (exit code {code})"
        log = f"Last lines of {self._log_path}:\n{self._log_tail()}"
        phase = "transfer" if "transfer: " in what else _PHASES.get(method, "rollout")
        return EngineError(f"{method}: the rollout engine {what}{end}.\n{log}", phase)

    def _signal_group(self, signal_number: int) -> None:
        try:
            os.killpg(self.pid, signal_number)  # the child leads a session of its own
        except ProcessLookupError:
            pass

    def _log_tail(self) -> str:
        with open(self._log_path, "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - 16384))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-_LOG_LINES:])


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
        VLLM_ALLOW_INSECURE_SERIALIZATION="0",  # nobody sends it pickled functions
        VLLM_HOST_IP="127.0.0.1",  # an engine spans one node
        PYTHONUNBUFFERED="1",
    )
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0))
        environment["OMP_NUM_THREADS"] = str(max(1, cores // config.tensor_parallel_size))
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # vLLM binds one worker to one NUMA node, or refuses
        # The trainer's processes share these cores: waiting threads that spin made generation 10 times slower.
        environment["OMP_WAIT_POLICY"] = "passive"
        # Every sync allocates the model anew, layer by layer: with memory kept by the allocator instead of returned and
        # mapped again page by page, loading took two thirds of the time.
        environment["MALLOC_MMAP_MAX_"] = "0"
        environment["MALLOC_TRIM_THRESHOLD_"] = str(2**32)
    package_root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, environment.get("PYTHONPATH")]))
    if config.visible_devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = config.visible_devices
    return environment
