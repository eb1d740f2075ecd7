"""A pool of processes that run the reward function. A failing verifier costs one response."""

import collections
import json
import logging
import math
import os
import pickle
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_espo.config import Reward
from megatron_espo.errors import InputError, log_first
from megatron_espo.rewards import sandbox
from megatron_espo.types import Prompt

START_TIMEOUT_S = 180.0  # imports from a cold network file system
MAX_FAILED_STARTS = 3
MAX_REPLY_BYTES = 1 << 16
MAX_FILE_BYTES = 64 << 20  # of a file that a verifier writes

logger = logging.getLogger(__name__)


def wait_or_cancel(futures: Sequence[Future], on_progress: Callable[[int, int], None]) -> list[Any]:
    """:func:`wait_all`; an exception cancels the futures."""
    try:
        return wait_all(futures, on_progress)
    finally:
        for future in futures:
            future.cancel()


def wait_all(futures: Sequence[Future], on_progress: Callable[[int, int], None]) -> list[Any]:
    """Wait for all futures and return their results.

    Args:
        on_progress: called with (finished, all) four times a second. It may raise.
    """
    while True:
        finished = sum(future.done() for future in futures)
        on_progress(finished, len(futures))
        if finished == len(futures):
            return [future.result() for future in futures]
        wait(futures, timeout=0.25)


class RewardPool:
    """Scores responses in persistent worker processes, which start on first use.

    A worker is a fresh interpreter in its own session, with few environment variables and with a
    temporary folder as its home; see ``sandbox`` for its limits and for ``isolate``. When one
    response takes longer than ``timeout_s`` of wall-clock time, the pool kills the worker's process
    group and replaces the worker. Workers write to standard error only and end with this process.
    ``module:function`` is looked up on the caller's ``sys.path``, then in the working directory.

    Args:
        config: the ``reward`` section of the configuration.
        function: name of the reward function.

    Attributes:
        failures: number of responses without a score so far, by cause: ``timeout``, ``crash``,
            ``exception`` (the function raised or returned something other than a finite number).
        last_failure: message of the latest failure.
    """

    def __init__(self, config: Reward, function: str) -> None:
        self._config, self._function, self._lock = config, function, threading.Lock()
        self._threads = ThreadPoolExecutor(config.workers, "reward")
        self._workers: dict[int, _Worker] = {}  # by the id of the thread that uses it
        self._is_closed = False
        self.failures: collections.Counter[str] = collections.Counter()
        self.last_failure = ""

    def start(self) -> None:
        """Start one worker and wait until it has loaded the reward function.

        Raises:
            InputError: the function cannot be loaded; carries the worker's message.
        """
        worker = self._threads.submit(self._take_worker).result()
        if worker.refused:
            message = "reward workers are limited, but not isolated (%s): see docs/rewards.md"
            logger.warning(message, worker.refused)

    def submit(self, prompt: Prompt, response: str) -> Future[float | None]:
        """Score one response in the background.

        Returns:
            A finite float, or ``None`` where the verifier crashed, hung, raised or returned
            something else. InputError: the reward function cannot be loaded.
        """
        return self._threads.submit(self._score, prompt, response)

    def close(self) -> None:
        """Kill the workers."""
        with self._lock:
            self._is_closed = True
            self._threads.shutdown(wait=False, cancel_futures=True)
            for worker in list(self._workers.values()):
                worker.kill()

    def _take_worker(self) -> "_Worker":
        """Return this thread's worker. Start one if there is none, or if it ended."""
        thread = threading.get_ident()
        if thread in self._workers:
            if self._workers[thread].process.poll() is None:
                return self._workers[thread]
            self._remove_worker()
        cwd = os.getcwd()
        path = [*(entry or cwd for entry in sys.path), cwd]
        for _ in range(MAX_FAILED_STARTS):
            with self._lock:
                if self._is_closed:
                    raise CancelledError("the pool was closed")
                worker = self._workers[thread] = _Worker(self._config)
            try:
                reply = worker.call((path, self._function), START_TIMEOUT_S)
            except OSError as error:
                cause = "timeout" if isinstance(error, TimeoutError) else "crash"
                end = self._remove_worker(grace_s=1.0)
                continue
            if "refused" in reply:
                self._remove_worker()
                raise InputError(str(reply["refused"]))
            worker.refused = reply["ready"]
            return worker
        ended = f"worker ended before {self._function} was loaded ({cause}, {end})"
        raise InputError(f"reward.function: {ended}; see standard error")

    def _score(self, prompt: Prompt, response: str) -> float | None:
        worker, item = self._take_worker(), secrets.token_hex(8)
        try:
            reply = worker.call((item, prompt, response), self._config.timeout_s)
            if reply.get("item") != item:
                raise ConnectionError
        except TimeoutError:
            self._remove_worker()
            cause = "timeout"
            message = f"no answer in {self._config.timeout_s:g} s (reward.timeout_s)"
        except OSError:
            cause, message = "crash", f"the worker ended with {self._remove_worker(grace_s=1.0)}"
        else:
            score = reply.get("score")
            if isinstance(score, float) and math.isfinite(score):
                return score
            cause, message = "exception", str(reply.get("failure"))
        with self._lock:
            if not self._is_closed:
                self.last_failure = f"prompt {prompt.id!r}: {message}"
                log_first(logger, self.failures, cause, f"response not scored: {self.last_failure}")
        return None

    def _remove_worker(self, grace_s: float = 0.0) -> str:
        return self._workers.pop(threading.get_ident()).kill(grace_s)


class _Worker:
    """One worker process and the socket to it. One call at a time.

    Attributes:
        refused: what the kernel refused of the isolation, once the function is loaded.
    """

    refused: str | None = None

    def __init__(self, config: Reward) -> None:
        self._home = tempfile.TemporaryDirectory(
            prefix="megatron-espo-reward-", ignore_cleanup_errors=True
        )
        script, home = Path(__file__).with_name("worker.py"), self._home.name
        limits = sandbox.limits(config.memory_gib, MAX_FILE_BYTES, config.isolate)
        self._socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, script, str(theirs.fileno()), *limits],
                stdin=subprocess.DEVNULL,
                stdout=2,  # standard output belongs to the caller
                pass_fds=[theirs.fileno()],
                cwd=home,
                env=sandbox.passed_environment(config.environment, home),
                start_new_session=True,  # so that one kill reaches the verifier's children
            )

    def call(self, request: object, timeout_s: float) -> dict[str, Any]:
        """Send a request and return the reply.

        The reply is JSON: a process that ran a model's output may have written it.

        Raises:
            TimeoutError: no reply in time.
            ConnectionError: the worker ended, or its reply is not one JSON object.
        """
        deadline = time.monotonic() + timeout_s
        self._socket.settimeout(timeout_s)
        self._socket.sendall(pickle.dumps(request))
        reply = b""
        while not reply.endswith(b"\n"):
            # Data that is there is read even after the deadline.
            self._socket.settimeout(max(1e-3, deadline - time.monotonic()))
            data = self._socket.recv(MAX_REPLY_BYTES)
            reply += data
            if not data or len(reply) > MAX_REPLY_BYTES:
                raise ConnectionError
        with suppress(ValueError):
            if isinstance(found := json.loads(reply), dict):
                return found
        raise ConnectionError

    def kill(self, grace_s: float = 0.0) -> str:
        """Kill the process group, remove the folder and return how the process ended.

        Args:
            grace_s: seconds for a process that is already ending to leave its own exit status.
        """
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(grace_s)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # ends a call in another thread
        code = self.process.wait()
        self._home.cleanup()
        # Negative: a signal. 128 + n: the signal n of the isolated process below this one.
        number = -code if code < 0 else code - 128
        if number in set(signal.Signals):
            return f"signal {signal.Signals(number).name}"
        return f"exit status {code}"
