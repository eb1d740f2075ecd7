"""A pool of reward workers that can be killed: a verifier that hangs, crashes or lies costs one item, not the run."""

import collections
import json
import logging
import math
import os
import pickle
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_espo.config import Reward
from megatron_espo.errors import InputError
from megatron_espo.types import Prompt

START_TIMEOUT_S = 180.0  # imports from a cold network file system
MAX_FAILED_STARTS = 3
MAX_REPLY_BYTES = 1 << 16
PROGRESS_INTERVAL_S = 1.0
MAX_FILE_BYTES = 64 << 20  # of a file that a verifier writes
# What Python and its libraries need; everything else of the trainer's environment (keys, tokens) stays there.
ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ")

logger = logging.getLogger(__name__)


class RewardPool:
    """Scores responses in persistent worker processes, started on first use.

    A worker is a fresh interpreter (no fork of the caller's threads, no second run of its ``__main__``) in a session, an
    almost empty environment and a temporary folder of its own, which is its home; see ``sandbox`` for its limits and for what
    ``isolate`` adds. It is killed with its process group when one item takes longer than ``timeout_s`` of wall-clock time, and
    replaced. Workers write to standard error only and die with the thread that started them. ``module:function`` is looked up on the caller's ``sys.path``,
    then in the working directory.

    Args:
        config: the ``reward`` section of the configuration.

    Attributes:
        failures: number of items without a score so far, by cause: ``timeout``, ``crash``, ``exception`` (the function
            raised or returned something other than a finite number).
        last_failure: what the latest of them said.
    """

    def __init__(self, config: Reward):
        self._config = config
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._told = False
        self._lock = threading.Lock()
        self.failures: collections.Counter[str] = collections.Counter()
        self.last_failure = ""

    def start(self) -> None:
        """Start one worker and wait until it has loaded the reward function.

        Raises:
            InputError: the function cannot be loaded; carries the worker's message.
        """
        with self._lock:
            while not any(worker.ready for worker in self._workers):
                self._replace_dead_workers(1)
                for worker, reply in self._replies(START_TIMEOUT_S):
                    self._settle(worker, reply, [])

    def score(
        self, items: Sequence[tuple[Prompt, str]], on_progress: Callable[[int, int], None] | None = None
    ) -> list[float | None]:
        """Judge ``(prompt, response)`` pairs; results in the same order.

        Args:
            on_progress: called with (items judged, all items) at least once a second; may raise to give up.

        Returns:
            One finite float an item, or None where the verifier crashed, hung, raised or returned nonsense.

        Raises:
            InputError: the reward function cannot be loaded.
        """
        with self.scoring() as scoring:
            for number, (prompt, response) in enumerate(items):
                scoring.add(number, prompt, response)
            return scoring.finish(on_progress)

    @contextmanager
    def scoring(self) -> Iterator["Scoring"]:
        """Judge items while more of them come; nobody else may use the pool meanwhile."""
        with self._lock:
            try:
                yield Scoring(self)
            except BaseException:
                self._kill_all()  # a worker in the middle of an item would answer the next call with it
                raise

    def refuse_failures(self, failed: int, total: int, step: int) -> None:
        """InputError where more than ``max_failed`` of a step's responses have no score."""
        if failed > self._config.max_failed * total:
            raise InputError(
                f"reward.function: expected a number for each response, but {failed} of {total} of step {step} failed, more than "
                f"reward.max_failed = {self._config.max_failed:g}; mend the function or raise it; the last one: {self.last_failure}"
            )

    def close(self) -> None:
        """Kill the workers. The pool may be used again; it then starts new ones."""
        with self._lock:
            self._kill_all()

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def busy(self) -> int:
        """Workers in the middle of an item."""
        return sum(worker.item is not None for worker in self._workers)

    def _kill_all(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def _replace_dead_workers(self, wanted: int) -> None:
        # Only idle ones: the last words of a busy or starting worker are still to be read.
        for worker in [w for w in self._workers if w.ready and w.item is None and w.process.poll() is not None]:
            self._remove(worker)
        while len(self._workers) < wanted:
            self._workers.append(_Worker(self._config))

    def _remove(self, worker: "_Worker") -> None:
        worker.kill()
        self._workers.remove(worker)

    def _dispatch(self, todo: collections.deque[tuple[int, tuple[Prompt, str]]]) -> None:
        """Give every idle worker one item; one at a time, so that its clock is the item's own."""
        self._replace_dead_workers(min(self._config.workers, self.busy + len(todo)))
        for worker in self._workers:
            if todo and worker.ready and worker.item is None:
                index, (prompt, response) = todo.popleft()
                worker.send((index, prompt, response))
                worker.item, worker.prompt_id = index, prompt.id
                worker.deadline = time.monotonic() + self._config.timeout_s

    def _replies(self, wait_s: float) -> list[tuple["_Worker", dict[str, Any]]]:
        """Move bytes for at most ``wait_s`` seconds; what workers said, where ``{"lost": cause}`` stands for a dead one."""
        waiting = [worker for worker in self._workers if worker.item is not None or not worker.ready]
        with selectors.DefaultSelector() as selector:
            for worker in waiting:
                selector.register(worker.reply_fd, selectors.EVENT_READ, worker)
                if worker.unsent:
                    selector.register(worker.request_fd, selectors.EVENT_WRITE, worker)
            now = time.monotonic()
            events = selector.select(max(0.0, min([wait_s, *(worker.deadline - now for worker in waiting)])))
        replies = []
        for key, mask in events:
            if mask & selectors.EVENT_WRITE:
                key.data.flush()
            elif (reply := key.data.receive()) is not None:
                replies.append((key.data, reply))
        # After reading: an answer that came in time counts even if this process was too busy to look.
        answered = {worker for worker, _ in replies}
        late = [worker for worker in waiting if worker not in answered and worker.deadline <= time.monotonic()]
        return replies + [(worker, {"lost": "timeout"}) for worker in late]

    def _settle(self, worker: "_Worker", reply: dict[str, Any], results: list[float | None] | dict[int, float | None]) -> None:
        if not worker.ready:
            self._settle_start(worker, reply)
            return
        index, worker.item, score = worker.item, None, reply.get("score")
        if "lost" in reply or reply.get("item") != index:
            cause = reply.get("lost", "crash")
            end = worker.kill(grace_s=0.0 if cause == "timeout" else 1.0)
            late = f"no answer in {self._config.timeout_s:g} s (reward.timeout_s)"
            self._count_failure(cause, worker, late if cause == "timeout" else f"the worker ended with {end}")
            self._remove(worker)
        elif isinstance(score, float) and math.isfinite(score):
            results[index] = score
        else:
            self._count_failure("exception", worker, str(reply.get("failure")))

    def _settle_start(self, worker: "_Worker", reply: dict[str, Any]) -> None:
        if "ready" in reply:
            worker.ready, self._failed_starts = True, 0
            if reply["ready"] and not self._told:
                self._told = True
                logger.warning("reward workers are limited, but not isolated (%s): see docs/rewards.md", reply["ready"])
            return
        self._failed_starts += 1
        end = worker.kill(grace_s=1.0)
        self._remove(worker)
        if "refused" in reply:
            raise InputError(str(reply["refused"]))
        if self._failed_starts == MAX_FAILED_STARTS:
            self._failed_starts = 0
            raise InputError(
                f"reward.function: worker ended before {self._config.function} was loaded"
                f" ({reply.get('lost', 'nonsense')}, {end}); its last words are on standard error"
            )

    def _count_failure(self, cause: str, worker: "_Worker", message: str) -> None:
        self.last_failure = f"prompt {worker.prompt_id!r}: {message}"
        if not self.failures[cause]:
            logger.warning("a response could not be judged (%s): %s; later ones are only counted", cause, self.last_failure)
        self.failures[cause] += 1


class Scoring:
    """Items under judgement, by number; made by :meth:`RewardPool.scoring`."""

    def __init__(self, pool: RewardPool) -> None:
        self._pool, self._todo = pool, collections.deque()
        self._scores: dict[int, float | None] = {}

    def add(self, number: int, prompt: Prompt, response: str) -> None:
        """Judge a response, once."""
        if number not in self._scores:
            self._scores[number] = None
            self._todo.append((number, (prompt, response)))

    def pump(self, wait_s: float = 0.0) -> int:
        """Hand items to idle workers and take answers for at most ``wait_s`` seconds; how many items are judged."""
        self._pool._dispatch(self._todo)
        for worker, reply in self._pool._replies(wait_s):
            self._pool._settle(worker, reply, self._scores)
        return len(self._scores) - len(self._todo) - self._pool.busy

    def finish(self, on_progress: Callable[[int, int], None] | None = None) -> list[float | None]:
        """Wait for all; scores by number. See :meth:`RewardPool.score`."""
        judged = self.pump()
        while self._todo or self._pool.busy:
            if on_progress:
                on_progress(judged, len(self._scores))
            judged = self.pump(PROGRESS_INTERVAL_S)
        return [self._scores[number] for number in range(len(self._scores))]


class _Worker:
    """One worker process and its two pipes. Nothing here blocks."""

    def __init__(self, config: Reward):
        self._home = tempfile.TemporaryDirectory(prefix="megatron-espo-reward-", ignore_cleanup_errors=True)
        child_request, self.request_fd = os.pipe()
        self.reply_fd, child_reply = os.pipe()
        command = [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))]
        passed = {name: os.environ[name] for name in (*ENVIRONMENT, *config.environment) if name in os.environ}
        try:
            self.process = subprocess.Popen(
                [*command, str(child_request), str(child_reply), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=2,  # the caller's standard output is its own
                pass_fds=(child_request, child_reply),
                cwd=self._home.name,
                env=passed | {"HOME": self._home.name, "TMPDIR": self._home.name, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # one kill reaches what the verifier started
            )
        finally:
            os.close(child_request)
            os.close(child_reply)
        os.set_blocking(self.request_fd, False)
        os.set_blocking(self.reply_fd, False)
        self.unsent, self._unread = memoryview(b""), b""
        self.ready, self.item, self.prompt_id = False, None, None
        self.deadline = time.monotonic() + START_TIMEOUT_S
        cwd = os.getcwd()
        path = [entry or cwd for entry in sys.path]
        self.send(
            {
                "sys_path": path if cwd in path else [*path, cwd],
                "function": config.function,
                "memory_bytes": int(config.memory_gib * 2**30),
                "file_bytes": MAX_FILE_BYTES,
                "isolate": config.isolate,
            }
        )

    def send(self, request: object) -> None:
        body = pickle.dumps(request)
        assert not self.unsent, "a worker takes one request at a time"
        self.unsent = memoryview(len(body).to_bytes(8, "little") + body)
        self.flush()

    def flush(self) -> None:
        try:
            while self.unsent:
                self.unsent = self.unsent[os.write(self.request_fd, self.unsent) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.unsent = memoryview(b"")  # it died; the reply pipe's end of file says so

    def receive(self) -> dict[str, Any] | None:
        """One reply, None while it is incomplete, or ``{"lost": "crash"}`` for a dead or incoherent worker."""
        try:
            data = os.read(self.reply_fd, MAX_REPLY_BYTES)
        except BlockingIOError:
            return None
        self._unread += data
        line, newline, rest = self._unread.partition(b"\n")
        if not newline:
            return None if data and len(line) < MAX_REPLY_BYTES else {"lost": "crash"}
        self._unread = b""
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        return reply if isinstance(reply, dict) and not rest else {"lost": "crash"}

    def kill(self, grace_s: float = 0.0) -> str:
        """Kill the process group, reap the process, close the pipes, remove its folder; says how the process ended. Harmless twice.

        Args:
            grace_s: wait so long for a process that is already ending, to learn its own exit status.
        """
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            pass
        if self.request_fd >= 0:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.process.wait()
            os.close(self.request_fd)
            os.close(self.reply_fd)
            self.request_fd = self.reply_fd = -1
            self._home.cleanup()
        return _end_in_words(self.process.returncode)


def _end_in_words(code: int) -> str:
    """Exit status, or signal: of the process itself (negative), or of the isolated worker that it waited for (128 + n)."""
    number = -code if code < 0 else code - 128
    if number not in set(signal.Signals):
        return f"exit status {code}"
    return f"signal {signal.Signals(number).name}"
