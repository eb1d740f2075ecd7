"""Wall time of a step, synchronous and one-step-off, if rollouts and training take equally long.

    python benchmarks/one_step_off.py models/SmolLM2-135M-Instruct

The quick start with one rank on its own core and the engine on another, as on separate GPUs. The
learning rate moves no weight, so both ways sample and train the same tokens. The runs alternate;
the first two steps of each run are dropped.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from statistics import median

from measure import ROOT

WAYS = {
    "synchronous": [],
    "one-step-off": ["rollout.max_staleness=1", "algorithm.rollout_correction=token"],
}
DROPPED = 2
TRAIN = "-m torch.distributed.run --standalone --nproc-per-node 1 -m megatron_espo train"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("overrides", metavar="section.key=value", nargs="*")
    args = parser.parse_intermixed_args()
    found: dict[str, list[dict]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds):
            for name, extra in WAYS.items():
                found[name] += run(Path(folder, f"{name}{turn}"), args, extra)
    medians = {name: report(name, lines) for name, lines in found.items()}
    print(f"ratio {medians['one-step-off'] / medians['synchronous']:.2f}")


ONE_UPDATE = "algorithm.num_mini_batches=1"


def run(folder: Path, args: argparse.Namespace, extra: list[str]) -> list[dict]:
    """One training run; the metrics of its steps."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    command = ["taskset", "-c", str(first), sys.executable, *TRAIN.split()]
    command += [
        "examples/quickstart.yaml",
        "optimizer.lr=1e-30",
        ONE_UPDATE,
        f"model.path={args.model}",
    ]
    command += [f"run.dir={folder}", f"run.steps={args.steps}", "run.checkpoint_every=null"]
    command += ["run.save_hf=false", *args.overrides, *extra]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL) as process:
        done = threading.Event()
        mover = threading.Thread(target=move_engine, args=(folder, second, done))
        mover.start()
        process.wait()
        done.set()
        mover.join()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][DROPPED:]


def move_engine(folder: Path, core: int, done: threading.Event) -> None:
    """Move every thread of the processes that write ``engine.log`` to ``core``, until ``done``."""
    while not done.wait(0.5):
        for stdout in Path("/proc").glob("[0-9]*/fd/1"):
            try:
                if stdout.readlink() == folder / "engine.log":
                    for thread in (stdout.parents[1] / "task").iterdir():
                        os.sched_setaffinity(int(thread.name), {core})
            except OSError:  # the process ended, or belongs to another user
                pass


def report(name: str, lines: list[dict]) -> float:
    """Print medians over the steps; return the median of a whole step."""
    phases = {
        phase: median(line.get(f"time/{phase}_s", 0.0) for line in lines)
        for phase in ("rollout", "train", "sync", "step")
    }
    medians = " ".join(f"{phase} {value:.1f}" for phase, value in phases.items())
    steps = ", ".join(f"{line['time/step_s']:.1f}" for line in lines)
    print(f"{name}: {medians} s; steps {steps}", flush=True)
    return phases["step"]


if __name__ == "__main__":
    main()
