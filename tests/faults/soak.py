"""A long run with a random fault every ten steps, restarted with the same command. It ends with the
weights of a run without faults.

    python -m tests.faults.soak --steps 200 --seed 1
"""

import argparse
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from megatron_espo.files import read_jsonl
from tests.faults.runs import Runs, environment
from tests.support.distributed import ROOT

EVERY, FAULT_EVERY = 5, 10
# Injected at a random step and rank. Faults of a checkpoint are injected at a step that saves.
INJECTED = (
    "backward:kill backward:freeze backward:loop backward:oom train:term train:kill sync:kill "
    "sync:term gradient:raise gradient:kill weights:flip checkpoint:term save:kill save:full"
).split()
ON_RANK_0 = ("rename:kill", "rename:full", "latest:kill", "latest:full")
AT_A_CHECKPOINT = ("checkpoint", "save", "rename", "latest")
FROM_OUTSIDE = ("STOP file", "SIGTERM to torchrun", "SIGKILL to a rank")


def disturb(runs: Runs, run: str, number: int, seed: int) -> str:
    """Run one launch with a fault within the ten steps of ``number``.

    Returns the fault and the end of the launch.
    """
    draw, first = random.Random(f"{seed}-{number}"), number * FAULT_EVERY + 1
    first = max(first, len(read_jsonl(runs.folder / run / "metrics.jsonl")) + 1)
    step, rank = min(first + draw.randrange(FAULT_EVERY), runs.steps), draw.randrange(2)
    kind = draw.choice((*INJECTED, *ON_RANK_0, *FROM_OUTSIDE))
    if kind in FROM_OUTSIDE:
        return f"{kind} after step {step}: {_from_outside(runs, run, kind, step)}"
    point, action = kind.split(":")
    if point in AT_A_CHECKPOINT:
        step = min(-(-step // EVERY), runs.steps // EVERY) * EVERY
    fault = f"{point}:{0 if kind in ON_RANK_0 else rank}:{step}:{action}"
    done = runs.train(run, fault=fault, by_torchrun=True)
    stopped = action == "term"
    assert (done.returncode == 0) == stopped, (fault, done.stdout, done.stderr)
    status = runs.status(run)
    assert status["state"] == ("requeue" if stopped else "failed"), (fault, status)
    return f"{fault}: {status['why']}"


def _from_outside(runs: Runs, run: str, kind: str, step: int) -> str:
    process = subprocess.Popen(
        runs.command(run),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    runs.wait_for_step(process, run, step)
    if kind == "STOP file":
        (runs.folder / run / "STOP").touch()
    elif kind == "SIGTERM to torchrun":
        process.send_signal(signal.SIGTERM)
    else:
        children = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
        ).stdout.split()
        subprocess.run(["kill", "-KILL", children[-1]])
    process.wait(timeout=600)
    runs.assert_no_orphans(run)
    return str(runs.status(run)["why"])


def soak(
    runs: Runs, undisturbed: dict[str, torch.Tensor], faults: int, seed: int, run: str = "soak"
) -> None:
    """Run ``faults`` launches with faults and a last one, and compare the weights."""
    began = time.monotonic()
    for number in range(faults):
        print(f"{time.monotonic() - began:5.0f} s  {disturb(runs, run, number, seed)}", flush=True)
    done = runs.train(run)
    assert done.returncode == 0, done.stdout + done.stderr
    runs.assert_same_end(run, undisturbed)
    done_text = f"done: {runs.steps} steps, {faults} faults, weights equal bit for bit"
    print(f"{time.monotonic() - began:5.0f} s  {done_text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs.prepare(Path(folder), steps=args.steps, every=EVERY)
        began = time.monotonic()
        done = runs.train("undisturbed")
        assert done.returncode == 0, done.stdout + done.stderr
        print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)
        soak(runs, runs.weights("undisturbed"), (args.steps - 1) // FAULT_EVERY, args.seed)


if __name__ == "__main__":
    main()
