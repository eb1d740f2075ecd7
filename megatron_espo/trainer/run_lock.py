"""One run at a time in a run's folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import SoftFileLease, Timeout

from megatron_espo.errors import InputError

# A lock that its owner did not refresh for so long is taken over.
LEASE_S = 12.0


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Own ``run.dir`` while a run writes to it, with the file ``run.lock``.

    The lock of a process that ended is taken over: at once on the same host, elsewhere after
    :data:`LEASE_S` without a heartbeat. Clocks of hosts are not compared, so a shared file
    system is enough.

    Raises:
        InputError: another process owns the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = SoftFileLease(folder / "run.lock", lease_duration=LEASE_S, is_singleton=False)
    try:
        held = lock.acquire(timeout=1.5 * LEASE_S, poll_interval=LEASE_S / 20)
    except Timeout:
        owner = lock.owner
        who = f"process {owner.pid} on {owner.hostname}" if owner else "another process"
        raise InputError(
            f"run.dir: expected a folder that no other run uses, got {folder}, which {who} uses; "
            "give this run another run.dir, or stop that run first"
        ) from None
    with held:
        yield
