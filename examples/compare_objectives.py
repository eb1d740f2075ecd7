"""A study on CPU cores: six objectives, two tasks, three seeds, ablations of ESPO, older rollouts.

    source tools/env.sh && python tools/prepare_smollm2.py models/SmolLM2-135M-Instruct
    python examples/compare_objectives.py --page docs/study.md
    python examples/compare_objectives.py run.steps=4 --tasks sums --variants espo grpo --seeds 1 \\
        --out runs/small

Every run trains the quick start's model with the same prompts, rollouts, optimizer steps and seeds.
With `algorithm.num_mini_batches=4`, three of four updates are off-policy, so clipping matters. One
run goes on each core at the same time. A finished run is not repeated. An interrupted run is
repeated from its beginning. A failed run does not stop the others; the next call repeats it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from compare_report import write_results

ROOT = Path(__file__).resolve().parents[1]
COMMON = [
    "run.steps=10", "run.save_hf=false", "run.checkpoint_every=null", "run.samples_per_step=0",
    "algorithm.num_mini_batches=4",
    "rollout.canary_prompts=0", "rollout.verify_every=0",
    "eval.samples=1", "eval.temperature=0",
]  # fmt: skip
TASKS = {"sums": "reasoning_gym:chain_sum", "products": "reasoning_gym:products"}
TASK_ARGS = "min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 2"
OBJECTIVES = {
    name: [f"algorithm.objective={name}"]
    for name in ("espo", "gspo", "grpo", "dapo", "cispo", "gmpo")
}
# On the first task. The fixed clip range is about the mean that Eq. 8 gives this model:
# 1.1 nats x 0.02 / ln 49152.
ABLATIONS = {
    "espo-fixed-clip": ["algorithm.alpha=1e-9", "algorithm.clip_floor=0.002"],
    "espo-one-group": ["algorithm.quantiles=[]"],
    "espo-rho-0.1": ["algorithm.quantiles=[0.9]"],
    "espo-rho-0.4": ["algorithm.quantiles=[0.6]"],
    "espo-alpha-0.01": ["algorithm.alpha=0.01"],
    "espo-alpha-0.05": ["algorithm.alpha=0.05"],
}
# ESPO on rollouts of older weights, also on the first task.
ASYNCHRONOUS = {
    "espo-one-step-off": ["rollout.max_staleness=1", "algorithm.rollout_correction=token"],
    "espo-partial": [
        "rollout.max_staleness=2",
        "rollout.over_sampling_prompts=8",
        "algorithm.rollout_correction=token",
    ],
}
VARIANTS = OBJECTIVES | ABLATIONS | ASYNCHRONOUS


@dataclass(frozen=True)
class Job:
    """One run of the study."""

    task: str
    variant: str
    seed: int
    folder: Path
    settings: tuple[str, ...]

    def finished(self) -> bool:
        """Whether the run is complete. SystemExit: it was made with other settings."""
        # A run that is stopped in its last step has a summary but no evaluation.
        if not all((self.folder / name).is_file() for name in ("summary.json", "eval.jsonl")):
            return False
        made_with = json.loads((self.folder / "settings.json").read_text())
        if made_with != list(self.settings):
            changed = sorted(set(made_with) ^ set(self.settings))
            changes = ", ".join(changed)
            sys.exit(
                f"{self.folder}: made with other settings ({changes}); change --out or remove it"
            )
        return True

    def start(self, core: int) -> subprocess.Popen:
        """Start the run from its beginning on one core."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        (self.folder / "settings.json").write_text(json.dumps(self.settings))
        command = [
            "taskset",
            "--cpu-list",
            str(core),
            sys.executable,
            "-m",
            "megatron_espo",
            "train",
        ]
        command += ["examples/quickstart.yaml", f"run.dir={self.folder}", *self.settings]
        defaults = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment = defaults | os.environ | {"OMP_NUM_THREADS": "1"}
        with (self.folder / "train.log").open("w") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )


def plan(args: argparse.Namespace) -> Iterator[Job]:
    """Yield all runs, seed by seed: an interrupted study has every variant of the first seed."""
    for seed, task, variant in product(args.seeds, args.tasks, VARIANTS):
        is_first_task = task == next(iter(TASKS))
        if variant in args.variants and (variant in OBJECTIVES or is_first_task):
            data = [
                f"data.prompts={TASKS[task]}",
                f"data.task_args={{{TASK_ARGS}}}",
                f"run.seed={seed}",
                f"eval.prompts={TASKS[task]}",
                f"eval.task_args={{{TASK_ARGS}, seed: 12345, size: 64}}",
                "eval.every=1000",
            ]
            folder = (args.out / f"{task}-{variant}-{seed}").absolute()
            settings = COMMON + data + VARIANTS[variant] + args.overrides
            yield Job(task, variant, seed, folder, tuple(settings))


def run_all(jobs: list[Job], cores: list[int]) -> list[Job]:
    """Run the unfinished jobs, one on each core at a time. Return the failed jobs."""
    waiting = [job for job in jobs if not job.finished()]
    done = len(jobs) - len(waiting)
    print(f"{done} of {len(jobs)} runs are finished; {len(cores)} cores run the others", flush=True)
    running: dict[int, tuple[Job, subprocess.Popen, float]] = {}
    failed, done, began = [], 0, time.monotonic()
    try:
        while waiting or running:
            for core in cores:
                if core not in running and waiting:
                    job = waiting.pop(0)
                    running[core] = (job, job.start(core), time.monotonic())
            time.sleep(0.5)
            for core, (job, process, started) in list(running.items()):
                if not ended(process, job.folder):
                    continue
                del running[core]
                done += 1
                failed += [job] if process.returncode else []
                left = (time.monotonic() - began) / done * (len(waiting) + len(running))
                result, seconds = outcome(job, process.returncode), time.monotonic() - started
                print(f"{result}, {seconds:.0f} s; about {left / 60:.0f} min left", flush=True)
    finally:
        for _, process, _ in running.values():
            process.terminate()
            process.wait()
    return failed


def ended(process: subprocess.Popen, folder: Path) -> bool:
    """Whether the run has ended. Writes its processor time, engine and verifiers included.

    Other work on the machine changes the processor time less than the elapsed time.
    """
    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    if not pid:
        return False
    process.returncode = os.waitstatus_to_exitcode(status)
    (folder / "processor_seconds.json").write_text(json.dumps(usage.ru_utime + usage.ru_stime))
    return True


def outcome(job: Job, returncode: int) -> str:
    name = f"{job.task} {job.variant} seed {job.seed}"
    if returncode:
        return f"{name}: FAILED, see {job.folder / 'train.log'}"
    summary = json.loads((job.folder / "summary.json").read_text())
    return f"{name}: reward {summary['reward_first3']:.3f} -> {summary['reward_last3']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument(
        "--page",
        type=Path,
        help="Markdown file; the part between its result marks is replaced",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings of every run; before the options",
    )
    args = parser.parse_args()
    jobs = list(plan(args))
    failed = run_all(jobs, sorted(os.sched_getaffinity(0)))
    runs = [(job.task, job.variant, job.seed, job.folder) for job in jobs if job.finished()]
    if runs:
        print(write_results(runs, args.out, args.page, " ".join(["python", *sys.argv])))
    sys.exit(f"{len(failed)} runs failed; the same command tries them again" if failed else 0)


if __name__ == "__main__":
    main()
