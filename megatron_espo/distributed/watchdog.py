"""End a run that makes no progress, and name the rank that caused it."""

import contextlib
import faulthandler
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # accelerate requires it

from megatron_espo.files import read_json

EXIT_CODE = 3
# Phases that report no progress. Their limit is longer by rollout.timeout_s, the engine's own.
SLOW_PHASES = ("start", "sleep", "sync", "checkpoint", "export")
BETWEEN = "between phases"
_MAX_TICK_S = 15.0
_SILENT_TICKS = 4
# A thread in a function of one of these files waits for other ranks.
_WAITING_IN = ("distributed_c10d.py", "p2p_communication.py", "param_and_grad_buffer.py")


class Watchdog:
    """Writes this rank's heartbeat and ends the run when no rank makes progress.

    A thread on each rank writes ``<run.dir>/heartbeats/rank<n>.json``. Once its own main thread is
    late, it reads the files of the others. A rank that waits for a working rank is late too, so a
    run ends only if *every* rank is late. The culprit is a rank whose process does not run; else a
    rank that is not inside a collective; among several, the first that stopped. Then every running
    rank writes its stacks beside its heartbeat and exits with ``EXIT_CODE``. A frozen culprit on
    the same machine is killed, because torchrun would wait for it.

    All hosts share the run's folder. Times are each host's own; no clocks are compared.

    Args:
        folder: the run's folder.
        rank, world_size: of this process.
        limit_s: seconds without progress.
        slow_s: seconds that are added for ``SLOW_PHASES``.
        log: called with the verdict on the rank that finds it, before the process ends.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        *,
        limit_s: float,
        slow_s: float,
        log: Callable[[str], None],
    ) -> None:
        self.folder, self.rank = folder / "heartbeats", rank
        self._world_size, self._log = world_size, log
        self._limit, self._slow = limit_s, slow_s
        self._tick = min(_MAX_TICK_S, limit_s / 20)
        self._process = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()}
        self._seen: dict[int, tuple[int, float]] = {}
        self._own_verdict: dict[str, Any] = {}
        self._count, self._ended, self._writing = 0, threading.Event(), threading.Lock()
        self.phase, self.step, self._last_beat = "start", 0, time.monotonic()

    @staticmethod
    def clear(folder: Path) -> None:
        """Remove the heartbeats of an earlier part. Call on one rank before the start."""
        shutil.rmtree(folder / "heartbeats", ignore_errors=True)
        (folder / "heartbeats").mkdir(parents=True)

    def __enter__(self) -> "Watchdog":
        self._stacks = open(self.folder / f"rank{self.rank}.stacks.txt", "w")  # never closed
        faulthandler.enable(self._stacks)  # also dumps the stacks of a segmentation fault
        faulthandler.register(signal.SIGUSR2, self._stacks)
        self._main = threading.get_ident()
        self._write()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.heartbeat("ended")

    def heartbeat(self, phase: str | None = None, step: int | None = None) -> None:
        """Record progress of the main thread. A new phase is written to the file at once."""
        self.step = self.step if step is None else step
        self._last_beat = time.monotonic()
        if phase is not None:
            self.phase = phase
            self._write()

    def gone(self, wait_s: float = 0.0) -> list[str]:
        """Return the ranks of this machine whose process has died, or dies within ``wait_s``.

        A dying process closes its connections before it disappears, hence the wait.
        """
        deadline = time.monotonic() + wait_s
        while True:
            running = [r for r in self._records().values() if r["phase"] != "ended"]
            here = [r for r in running if r["host"] == self._process["host"]]
            names = [_name(r) for r in here if not _runs(r["pid"])]
            if names or time.monotonic() >= deadline:
                return names
            time.sleep(0.05)

    def _verdict(self) -> dict[str, Any]:
        """Return the verdict of whichever rank found it; ``{}`` if there is none."""
        return read_json(self.folder / "verdict.json") or self._own_verdict

    def _watch(self) -> None:
        while not self._ended.wait(self._tick):
            self._write()
            if not self._verdict() and self._age() > self._limit_of(self.phase):
                self._judge()
            if verdict := self._verdict():
                self._end_process(verdict)

    def _write(self) -> None:
        path = self.folder / f"rank{self.rank}.json"
        with self._writing, contextlib.suppress(OSError):  # other code reports a full disk
            self._count += 1
            record = self._process | {
                "phase": self.phase,
                "step": self.step,
                "age_s": self._age(),
                "count": self._count,
                "waits_in": self._waits_in(),
            }
            path.with_suffix(".partial").write_text(json.dumps(record) + "\n")
            path.with_suffix(".partial").replace(path)

    def _judge(self) -> None:
        """If all ranks are late, choose the culprit and publish the verdict."""
        records, now = self._records(), time.monotonic()
        for rank, record in records.items():
            if rank not in self._seen or self._seen[rank][0] != record["count"]:
                self._seen[rank] = record["count"], now
        silence = {rank: now - self._seen[rank][1] for rank in records}
        ages = {rank: record["age_s"] + silence[rank] for rank, record in records.items()}
        late = {rank for rank, age in ages.items() if age > self._limit_of(records[rank]["phase"])}
        suspects = {rank: record for rank, record in records.items() if record["phase"] != "ended"}
        not_running = {rank for rank in suspects if silence[rank] > _SILENT_TICKS * self._tick}
        if len(late | not_running) == self._world_size:
            outside = {rank for rank, record in suspects.items() if not record["waits_in"]}
            culprit = max(not_running or outside or suspects, key=ages.__getitem__)
            self._publish(records[culprit], ages[culprit], bool(not_running))

    def _publish(self, culprit: dict[str, Any], seconds: float, frozen: bool) -> None:
        if frozen:
            how = "its process does not run"
        elif culprit["waits_in"]:
            how = f"waits in {culprit['waits_in']}"
        else:
            how = "inside no collective"
        why = (
            f"{_name(culprit)} stands still: step {culprit['step']}, phase {culprit['phase']}, "
            f"{seconds:.0f} s without progress (run.watchdog_s {self._limit:g}), {how}; stacks of "
            f"the running ranks in {self.folder}; run the same command again to continue"
        )
        self._own_verdict = {"why": why, "culprit": culprit, "frozen": frozen}
        with contextlib.suppress(OSError):  # with a full disk this rank ends the run alone
            try:  # only the first rank succeeds
                with open(self.folder / "verdict.json", "x") as file:
                    json.dump(self._own_verdict, file)
            except FileExistsError:
                return
            self._log(why)
        print(f"error: {why}", file=sys.stderr, flush=True)

    def _end_process(self, verdict: dict[str, Any]) -> None:
        faulthandler.dump_traceback(self._stacks)
        culprit, own = verdict["culprit"], self._process
        is_other = culprit["host"] == own["host"] and culprit["pid"] != own["pid"]
        kill = verdict["frozen"] and is_other
        with contextlib.suppress(ProcessLookupError):
            if kill:
                os.kill(culprit["pid"], signal.SIGUSR2)  # asks for its stacks
            time.sleep(2 * self._tick)  # until all ranks have read the verdict
            if kill:
                os.kill(culprit["pid"], signal.SIGKILL)
        os._exit(EXIT_CODE)

    def _records(self) -> dict[int, dict[str, Any]]:
        found = (read_json(self.folder / f"rank{rank}.json") for rank in range(self._world_size))
        return {record["rank"]: record for record in found if record}

    def _limit_of(self, phase: str) -> float:
        return self._limit + (self._slow if phase in SLOW_PHASES else 0.0)

    def _age(self) -> float:
        return time.monotonic() - self._last_beat

    def _waits_in(self) -> str | None:
        """Return the outermost function in which the main thread waits for other ranks."""
        frames = traceback.walk_stack(sys._current_frames()[self._main])
        codes = [frame.f_code for frame, _ in frames]
        names = [code.co_name for code in codes if code.co_filename.endswith(_WAITING_IN)]
        return names[-1] if names else None


def _name(record: dict[str, Any]) -> str:
    return f"rank {record['rank']} (process {record['pid']} on {record['host']})"


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
