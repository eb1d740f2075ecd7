"""One run at a time in a run's folder."""

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from megatron_espo.errors import InputError

NAME = "run.lock"
HEARTBEAT_S = 5.0
# A lock whose heartbeat did not change for so many intervals has no owner any more.
_MISSED = 3


class RunLock:
    """Owns ``run.dir`` while a run writes to it.

    The file ``run.lock`` names host and process of the owner and holds a counter that a thread
    raises every :data:`HEARTBEAT_S`. A lock of a process that ended is taken over: at once on the
    same host, elsewhere after the counter stood still for three intervals. Clocks of different
    hosts are not compared, so a shared file system is enough.

    Args:
        folder: the run's folder.

    Raises:
        InputError: another process owns the folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder, NAME)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._owner = {
            "host": socket.gethostname(),
            "namespace": os.readlink("/proc/self/ns/pid"),
            "pid": os.getpid(),
            "start": _start(os.getpid()),
        }
        self._beat = 0
        self._ended = threading.Event()
        while not self._create():
            self._take_over(_read(self._path))
        self._thread = threading.Thread(target=self._keep, name="run lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Remove the lock. Idempotent."""
        if not self._ended.is_set():
            self._ended.set()
            self._thread.join()
            if _same_owner(_read(self._path), self._owner):
                self._path.unlink(missing_ok=True)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _create(self) -> bool:
        """Create the lock, complete or not at all; ``False`` if there is one."""
        partial = self._write()
        try:
            os.link(partial, self._path)
        except FileExistsError:
            return False
        finally:
            partial.unlink()
        return True

    def _write(self) -> Path:
        partial = self._path.with_name(f"{NAME}.{self._owner['host']}.{os.getpid()}")
        partial.write_text(json.dumps(self._owner | {"heartbeat": self._beat}), encoding="utf-8")
        return partial

    def _keep(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            self._beat += 1
            try:
                if _same_owner(_read(self._path), self._owner):
                    os.replace(self._write(), self._path)
            except OSError:
                continue  # a full disk or a slow file server: the next interval tries again

    def _take_over(self, found: dict[str, Any]) -> None:
        """Remove a lock whose owner ended. InputError if the owner is alive."""
        if not found:  # the owner removed it meanwhile
            return
        if all(found.get(key) == self._owner[key] for key in ("host", "namespace")):
            is_alive = found.get("start") is not None and _start(found["pid"]) == found["start"]
        else:
            is_alive = self._changes(found)
        if is_alive:
            raise InputError(
                f"run.dir: expected a folder that no other run uses, got {self._path.parent}, "
                f"which process {found['pid']} on {found['host']} uses; give this run another "
                "run.dir, or stop that run first"
            )
        stale = self._path.with_name(f"{NAME}.stale.{self._owner['host']}.{os.getpid()}")
        try:
            self._path.rename(stale)
        except FileNotFoundError:
            return
        if not _same_owner(_read(stale), found):  # another process took it over first
            os.link(stale, self._path)
        stale.unlink()

    def _changes(self, found: dict[str, Any]) -> bool:
        deadline = time.monotonic() + _MISSED * HEARTBEAT_S
        while time.monotonic() < deadline:
            time.sleep(HEARTBEAT_S / 10)
            if (now := _read(self._path)) != found:
                return bool(now)
        return False


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _same_owner(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return bool(first) and all(
        first.get(key) == second.get(key) for key in ("host", "pid", "start")
    )


def _start(pid: int) -> str | None:
    """Boot and start time of a process (Linux); ``None``: it does not exist."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return None if fields[0] == "Z" else f"{boot}:{fields[19]}"
