"""Status of a run for other programs: ``status.json``, the watchdog's heartbeats, and one line
about a failure.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_espo.config import Config, Run
from megatron_espo.distributed.collectives import on_rank_0
from megatron_espo.distributed.runtime import Runtime
from megatron_espo.distributed.stop_request import Stopped
from megatron_espo.distributed.watchdog import Watchdog
from megatron_espo.errors import InputError
from megatron_espo.files import read_json, write_durably
from megatron_espo.trainer.run_lock import run_lock


def write_status(folder: Path, state: str, why: str | None = None) -> None:
    """Write ``status.json`` for schedulers.

    Args:
        folder: of the run.
        state: ``running``, ``done``, ``requeue`` (stopped on request; the same command continues)
            or ``failed``.
        why: reason of a stop or failure.
    """
    status = {"state": state, "why": why, "rank": int(os.environ.get("RANK", 0))}
    write_durably(folder / "status.json", json.dumps(status) + "\n")


@contextmanager
def reported(config: Config, runtime: Runtime) -> Iterator[Callable[..., None]]:
    """Run the block under a watchdog and write its outcome to ``status.json``. Yields the
    watchdog's ``heartbeat``.

    Does not propagate ``Stopped``. Collective: one broadcast over all ranks before the block, one
    after it.

    Raises:
        InputError: on every rank, if another run uses the folder.
    """
    folder, lock = Path(config.run.dir), ExitStack()

    def begin() -> None:
        lock.enter_context(run_lock(folder))
        Watchdog.clear(folder)
        write_status(folder, "running")

    on_rank_0(begin)
    watchdog = Watchdog(
        folder,
        runtime.rank,
        runtime.world_size,
        limit_s=config.run.watchdog_s,
        slow_s=config.rollout.timeout_s,
        log=lambda why: write_status(folder, "failed", why),
    )
    with lock, watchdog:
        try:
            yield watchdog.heartbeat
            on_rank_0(lambda: write_status(folder, "done"))
        except Stopped as stopped:
            reason = str(stopped)
            on_rank_0(lambda: write_status(folder, "requeue", reason))
        except BaseException as error:
            _report_failure(config.run, watchdog, error)
            raise


def _report_failure(run: Run, watchdog: Watchdog, error: BaseException) -> None:
    """Write the error to ``status.json`` and, on one line, to the terminal.

    Only the first rank that fails reports, because failures of other ranks are consequences. The
    command line prints an InputError.
    """
    folder, name = Path(run.dir), run.resume
    if read_json(folder / "status.json").get("state") == "failed":
        return
    try:  # ``Watchdog.clear`` removes the file
        (folder / "heartbeats" / "failure").touch(exist_ok=False)
    except FileExistsError:
        return
    except OSError:  # Disk full or no permission: reporting twice is better than never.
        pass
    why = f"{type(error).__name__}: {error}".removesuffix(": ")  # KeyboardInterrupt has no text
    if not isinstance(error, InputError):
        lost = any(word in why for word in ("peer", "remote process"))  # in gloo and NCCL errors
        gone = "".join(f"{name} has died; " for name in watchdog.gone(wait_s=2.0 * lost))
        place = f"{gone}rank {watchdog.rank}, step {watchdog.step}, phase {watchdog.phase}"
        line = why.strip().partition("\n")[0]
        latest = folder / "checkpoints" / "latest"
        start = "starts again, because no checkpoint is saved yet"
        if name == "never":
            start = "starts again (run.resume)"
        elif name != "latest" or latest.is_file():
            newest = latest.read_text(encoding="utf-8").strip() if name == "latest" else name
            start = f"continues from {newest}"
        why = f"{place}: {line}; the same command {start}"
        print(f"error: {why}", file=sys.stderr, flush=True)
    write_status(folder, "failed", why)
