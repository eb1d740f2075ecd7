"""Runs ``megatron-espo`` with a fault in one rank: ``MEGATRON_ESPO_FAULT=point:rank:step:action
python -m tests.faults.inject train ...``

Commas separate several faults. :func:`install` replaces functions of the package. Points:

* the start of a phase (``rollout``, ``reward``, ``train``, ``sync``, ``eval``, ``checkpoint``,
  ``export``);
* ``backward``: before each micro-batch; ``gradient``: after the backward pass; ``weights``: before
  ranks compare their weights; ``serve``: before an engine serves new weights;
* ``save``: before a save starts; ``write``: in its thread, when a file of this rank has some of its
  bytes; ``rename``: before the folder gets its name, and ``latest``: before ``latest`` is written.
  These two happen in the step of the save or later: the first time from the given step on.

Actions: ``kill`` (SIGKILL), ``freeze`` (SIGSTOP), ``term`` (SIGTERM), ``loop`` (endless), ``slow``
(5 s), ``raise`` (RuntimeError), ``full`` (OSError: no space left), ``oom`` (MemoryError),
``engine`` (SIGKILL to the API process of this rank's engine), ``nan`` and ``spike`` of a gradient,
``flip`` of a bit of a weight. Each fault happens once in a process.
"""

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

VARIABLE = "MEGATRON_ESPO_FAULT"
LATE_POINTS = ("rename", "latest")
SIGNALS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP, "term": signal.SIGTERM}
_step = 0


def inject(point: str, step: int | None = None) -> str | None:
    """Perform the fault of this point, rank and step (by default, the step that is running).

    Returns its action, which the caller may have to perform.
    """
    faults = list(filter(None, os.environ.get(VARIABLE, "").split(",")))
    rank, now = os.environ.get("RANK", "0"), _step if step is None else step

    def is_here(fault: str) -> bool:
        at, of_rank, at_step, _ = fault.split(":")
        late = now - int(at_step)
        return (at, of_rank) == (point, rank) and (late == 0 or late > 0 and point in LATE_POINTS)

    found = next(filter(is_here, faults), None)
    if found is None:
        return None
    os.environ[VARIABLE] = ",".join(fault for fault in faults if fault != found)
    action = found.rpartition(":")[2]
    if action in SIGNALS:
        os.kill(os.getpid(), SIGNALS[action])
    elif action == "engine":
        command = ["pgrep", "-P", str(os.getpid()), "-f", "vllm.entrypoints"]
        os.kill(int(subprocess.check_output(command)), signal.SIGKILL)
    elif action == "loop":
        while True:
            time.sleep(0.01)
    elif action == "slow":
        time.sleep(5)
    elif action == "raise":
        raise RuntimeError(f"injected at {point}, step {_step}")
    elif action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"injected at {point}")
    elif action == "oom":
        raise MemoryError(f"injected at {point}")
    return action


def install() -> None:
    """Replace the functions of the package in which faults happen."""
    from megatron_espo.megatron import actor, checkpoint, guards, patches
    from megatron_espo.megatron import train_engine as optimizer
    from megatron_espo.monitoring.progress import Phases
    from megatron_espo.rollout.vllm_engine import VLLMEngine
    from megatron_espo.trainer import checkpoints
    from megatron_espo.weights.verification import TOLERANCE

    # Runs of a few steps on random weights need other constants.
    actor.CHECK_WEIGHTS_EVERY, guards.LEAST_NORMS, TOLERANCE["bfloat16"] = 1, 3, 1.0

    phase, ticking, backward = Phases.phase, optimizer._ticking, optimizer.TrainEngine.backward

    @contextmanager
    def phase_with_fault(self, name, step, steps, *check):
        global _step
        with phase(self, name, step, steps, *check) as on_progress:
            _step = step
            inject(name)
            yield on_progress

    def ticking_with_fault(micro_batches, tick):
        for batch in ticking(micro_batches, tick):
            inject("backward")
            yield batch

    def backward_with_fault(self, *args):
        metrics = backward(self, *args)
        if action := inject("gradient"):
            self.chunks[0].buffers[0].grad_data *= {"nan": torch.nan, "spike": 1e6}[action]
        return metrics

    Phases.phase, optimizer._ticking, optimizer.TrainEngine.backward = (
        phase_with_fault,
        ticking_with_fault,
        backward_with_fault,
    )
    _before(
        actor.Actor,
        "_compare_ranks",
        lambda self, *_: inject("weights") and _flip(next(self.chunks[0].parameters())),
    )
    _before(VLLMEngine, "serve", lambda _: inject("serve"))
    _before(patches, "keep_checkpoint_results_in_process", lambda: inject("save"))
    _before(checkpoint._Hashing, "transform_save_stream", _in_the_middle_of_a_file)
    _before(Path, "rename", lambda path, _: path.suffix == ".partial" and inject("rename"))
    _before(checkpoints, "write_durably", lambda *_: inject("latest"))


def _before(owner, name: str, action) -> None:
    """Call ``action`` with the arguments of a function before that function."""
    original = getattr(owner, name)

    def replaced(*args):
        action(*args)
        return original(*args)

    setattr(owner, name, replaced)


def _in_the_middle_of_a_file(_, item, stream) -> None:
    if stream.tell():
        inject("write", int(Path(stream.name).parent.name[len("step_") :].split(".")[0]))


def _flip(parameter: torch.Tensor) -> None:
    """Flip one bit of the last value of the first row."""
    parameter.data.view(torch.uint8)[0, -1] ^= 1


if __name__ == "__main__":
    from megatron_espo.cli import main

    install()
    sys.exit(main())
