"""Names the rank that stands still and ends the run, before the collectives' own timeout does so without a name."""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_espo.run_files import read_json

EXIT_CODE = 3
# These may be silent for as long as the engine may (rollout.timeout_s, which ends with a name too), and then the limit more.
SLOW_PHASES = ("start", "sleep", "sync", "checkpoint", "export")
BETWEEN = "between phases"
_MOST_TICK_S = 15.0
_SILENT_TICKS = 4
# A thread inside one of these files waits for other ranks.
_WAITING_IN = ("distributed_c10d.py", "p2p_communication.py", "param_and_grad_buffer.py")


class Watchdog:
    """Heartbeats of a run: every rank's thread writes ``<run.dir>/heartbeats/rank0.json`` and, once its own main thread stands still, reads the others'.

    A rank that waits for a working one stands still too, and that is well; so a run ends only when *every* rank is late. To blame is a rank whose process does
    not run, else one that is not inside a collective, among several the one that stood still first. Then every living rank writes its
    stacks beside its heartbeat and exits with ``EXIT_CODE``; a process of that rank on the same machine is killed, because torchrun would wait for it.

    The run's folder is shared by all hosts. Times are each host's own; no clocks are compared.

    Args:
        folder: the run's.
        rank, world_size: of this process.
        limit_s: seconds without progress.
        slow_s: seconds more for the phases that report none.
        tell: called with the verdict, on the rank that finds it, before the end.
    """

    def __init__(
        self, folder: Path, rank: int, world_size: int, *, limit_s: float, slow_s: float, tell: Callable[[str], None] = lambda why: None
    ) -> None:
        self.folder, self.rank, self._world_size, self._tell = folder / "heartbeats", rank, world_size, tell
        self._limit, self._slow = limit_s, slow_s
        self._tick = min(_MOST_TICK_S, limit_s / 20)
        self._place = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()}
        self._seen: dict[int, tuple[int, float]] = {}
        self._own_verdict: dict[str, Any] = {}
        self._count, self._ended, self._writing = 0, threading.Event(), threading.Lock()
        self.phase, self.step, self._beaten = "start", 0, time.monotonic()

    @staticmethod
    def clear(folder: Path) -> None:
        """Remove the heartbeats of an earlier part of the run. On one rank, before any starts."""
        shutil.rmtree(folder / "heartbeats", ignore_errors=True)
        (folder / "heartbeats").mkdir(parents=True)

    def __enter__(self) -> "Watchdog":
        self._stacks = open(self.folder / f"rank{self.rank}.stacks.txt", "w")  # for the process's life
        faulthandler.enable(self._stacks)  # a segmentation fault leaves its stacks there too
        faulthandler.register(signal.SIGUSR2, self._stacks)
        self._main = threading.get_ident()
        self._write()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.beat("ended")

    def beat(self, phase: str | None = None, step: int | None = None) -> None:
        """The main thread makes progress; a new phase is written at once, the rest costs nothing."""
        self.step = self.step if step is None else step
        self._beaten = time.monotonic()
        if phase is not None:
            self.phase = phase
            self._write()

    def gone(self, wait_s: float = 0.0) -> list[str]:
        """Ranks of this machine whose process has died, or dies within ``wait_s``: its connections are closed a moment before."""
        deadline = time.monotonic() + wait_s
        while not (names := [_name(record) for record in self._records().values() if self._has_died(record)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        return names

    def _verdict(self) -> dict[str, Any]:
        """Who is to blame, of whichever rank found it; ``{}``: nobody."""
        return read_json(self.folder / "verdict.json") or self._own_verdict

    def _has_died(self, record: dict[str, Any]) -> bool:
        return record["phase"] != "ended" and record["host"] == self._place["host"] and not _runs(record["pid"])

    def _watch(self) -> None:
        while not self._ended.wait(self._tick):
            self._write()
            if not self._verdict() and self._age() > self._limit_of(self.phase):
                self._judge()
            if self._verdict():
                self._end_process(self._verdict())

    def _write(self) -> None:
        path = self.folder / f"rank{self.rank}.json"
        with self._writing, contextlib.suppress(OSError):  # a full disk has ways of its own to end a run
            self._count += 1
            record = self._place | {"phase": self.phase, "step": self.step, "age_s": self._age(), "count": self._count, "waits_in": self._waits_in()}
            path.with_suffix(".partial").write_text(json.dumps(record) + "\n")
            path.with_suffix(".partial").replace(path)

    def _judge(self) -> None:
        """Blame a rank if all are late."""
        records, now = self._records(), time.monotonic()
        for rank in range(self._world_size):
            count = records.get(rank, {}).get("count", 0)
            if self._seen.get(rank, (None, 0))[0] != count:
                self._seen[rank] = (count, now)
        silent = {rank for rank, (_, since) in self._seen.items() if now - since > _SILENT_TICKS * self._tick}
        ages = {rank: record["age_s"] + now - self._seen[rank][1] for rank, record in records.items()}
        late = {rank for rank, age in ages.items() if age > self._limit_of(records[rank]["phase"])}
        suspects = {rank: record for rank, record in records.items() if record["phase"] != "ended"}
        not_running = silent & suspects.keys()
        if len(late | not_running) == self._world_size:
            apart = not_running or {rank for rank, record in suspects.items() if not record["waits_in"]} or suspects.keys()
            culprit = max(apart, key=ages.__getitem__)
            self._publish(records[culprit], ages[culprit], bool(not_running))

    def _publish(self, culprit: dict[str, Any], seconds: float, frozen: bool) -> None:
        how = "its process does not run" if frozen else f"waits in {culprit['waits_in']}" if culprit["waits_in"] else "inside no collective"
        why = (
            f"{_name(culprit)} stands still: step {culprit['step']}, phase {culprit['phase']}, {seconds:.0f} s without progress (run.watchdog_s "
            f"{self._limit:g}), {how}; stacks of the living ranks in {self.folder}; the same command goes on"
        )
        self._own_verdict = {"why": why, "culprit": culprit, "frozen": frozen}
        with contextlib.suppress(OSError):  # a full disk: then this rank ends the run alone
            own = self.folder / f"verdict.{self.rank}"
            own.write_text(json.dumps(self._own_verdict))
            try:
                os.link(own, self.folder / "verdict.json")  # whole, and by one rank only
            except FileExistsError:
                return
            self._tell(why)
        print(f"error: {why}", file=sys.stderr, flush=True)

    def _end_process(self, verdict: dict[str, Any]) -> None:
        faulthandler.dump_traceback(self._stacks)
        culprit = verdict["culprit"]
        kill = verdict["frozen"] and culprit["host"] == self._place["host"] and culprit["pid"] != os.getpid()
        with contextlib.suppress(ProcessLookupError):
            if kill:
                os.kill(culprit["pid"], signal.SIGUSR2)  # its stacks, if anything of it runs
            time.sleep(2 * self._tick)  # until all have seen the verdict
            if kill:
                os.kill(culprit["pid"], signal.SIGKILL)
        os._exit(EXIT_CODE)

    def _records(self) -> dict[int, dict[str, Any]]:
        found = (read_json(self.folder / f"rank{rank}.json") for rank in range(self._world_size))
        return {record["rank"]: record for record in found if record}

    def _limit_of(self, phase: str) -> float:
        return self._limit + (self._slow if phase in SLOW_PHASES else 0.0)

    def _age(self) -> float:
        return time.monotonic() - self._beaten

    def _waits_in(self) -> str | None:
        """The outermost function of the main thread that waits for other ranks."""
        name, frame = None, sys._current_frames().get(self._main)
        while frame is not None:
            if frame.f_code.co_filename.endswith(_WAITING_IN):
                name = frame.f_code.co_name
            frame = frame.f_back
        return name


def _name(record: dict[str, Any]) -> str:
    return f"rank {record['rank']} (process {record['pid']} on {record['host']})"


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return not Path("/proc").is_dir()
    return state not in "ZX"
