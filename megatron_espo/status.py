"""What others hear of a run's life: ``status.json``, the watchdog's heartbeats, and one line about a failure."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_espo.collectives import on_rank_0
from megatron_espo.config import Config
from megatron_espo.errors import InputError
from megatron_espo.mcore.runtime import Runtime
from megatron_espo.run_files import read_json, write_durably
from megatron_espo.stopping import Stopped
from megatron_espo.watchdog import Watchdog


def write_status(folder: Path, state: str, why: str | None = None) -> None:
    """``status.json`` for schedulers: ``running``, ``done``, ``requeue`` (stopped on request: the same command goes on) or ``failed``."""
    write_durably(folder / "status.json", json.dumps({"state": state, "why": why, "rank": int(os.environ.get("RANK", 0))}) + "\n")


@contextmanager
def reported(config: Config, runtime: Runtime) -> Iterator[Callable[..., None]]:
    """A run inside a watchdog; yields its ``beat``. What the block does is written to ``status.json``, and Stopped ends here.

    Two broadcasts over all ranks, one before and one after.
    """
    folder = Path(config.run.dir)

    def begin() -> None:
        Watchdog.clear(folder)
        write_status(folder, "running")

    on_rank_0(begin)
    watchdog = Watchdog(
        folder,
        runtime.rank,
        runtime.world_size,
        limit_s=config.run.watchdog_s,
        slow_s=config.rollout.timeout_s,
        tell=lambda why: write_status(folder, "failed", why),
    )
    with watchdog:
        try:
            yield watchdog.beat
            on_rank_0(lambda: write_status(folder, "done"))
        except Stopped as stopped:
            reason = str(stopped)
            on_rank_0(lambda: write_status(folder, "requeue", reason))
        except BaseException as error:
            _tell_failure(folder, watchdog, error)
            raise


def _tell_failure(folder: Path, watchdog: Watchdog, error: BaseException) -> None:
    """Write why the run failed to ``status.json`` and, on one line, to the terminal, where mistakes (InputError) are told by the command line.

    Only the first rank to fail: what others then meet are the consequences.
    """
    if read_json(folder / "status.json").get("state") == "failed" or not _is_first(folder):
        return
    why = f"{type(error).__name__}: {error}"
    if not isinstance(error, InputError):
        lost = any(word in why for word in ("peer", "remote process"))  # as gloo and NCCL say it
        gone = "".join(f"{name} has died; " for name in watchdog.gone(wait_s=2.0 * lost))
        line = why.strip().partition("\n")[0]
        why = f"{gone}rank {watchdog.rank}, step {watchdog.step}, phase {watchdog.phase}: {line}; the same command goes on from the latest checkpoint"
        print(f"error: {why}", file=sys.stderr, flush=True)
    write_status(folder, "failed", why)


def _is_first(folder: Path) -> bool:
    """Whether no other rank tells its failure: of ranks that fail at once, the one that makes the file, which ``Watchdog.clear`` removes."""
    try:
        (folder / "heartbeats" / "failure").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # no room, no rights: rather twice than never
        pass
    return True
