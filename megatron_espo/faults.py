"""Fault injection for tests: ``MEGATRON_ESPO_FAULT=point:rank:step:action`` makes one rank fail at one place. Off without the variable.

Points: every phase of a step (``rollout``, ``reward``, ``train``, ``sync``, ``eval``, ``checkpoint``, ``export``), and places inside them that call :func:`inject`.

Actions: ``kill`` (SIGKILL), ``freeze`` (SIGSTOP), ``loop`` (an endless one), ``term`` (SIGTERM), ``raise`` (RuntimeError), ``full`` (OSError: no space left),
``oom`` (MemoryError), or a word that the place itself understands (``nan``, ``spike``, ``flip``, ``lose``). Each happens once in a process.
"""

import errno
import os
import signal
import time

VARIABLE = "MEGATRON_ESPO_FAULT"
SIGNALS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP, "term": signal.SIGTERM}
_step = 0


def at_step(step: int) -> None:
    """Tell the step that is being trained."""
    global _step
    _step = step


def inject(point: str) -> str | None:
    """Fail here if this point, rank and step are meant; returns the action where it is the caller's to take."""
    wanted = os.environ.get(VARIABLE, "").split(":")
    if wanted[:3] != [point, os.environ.get("RANK", "0"), str(_step)]:
        return None
    action = wanted[3]
    del os.environ[VARIABLE]
    if action in SIGNALS:
        os.kill(os.getpid(), SIGNALS[action])
    elif action == "loop":
        while True:
            time.sleep(0.01)
    elif action == "raise":
        raise RuntimeError(f"injected at {point}, step {_step}")
    elif action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"injected at {point}")
    elif action == "oom":
        raise MemoryError(f"injected at {point}")
    return action
