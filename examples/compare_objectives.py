"""A study of six objectives over hundreds of steps, on two CPU cores.

    source tools/env.sh
    python examples/compare_objectives.py --page docs/study.md
    python examples/compare_objectives.py --objectives espo --seeds 2 --steps 60 --out runs/small

It makes a small model that adds numbers (``study_sums.py``) and then trains it in three phases:

1. tuning: each objective with three learning rates and one seed. The best rate on validation
   prompts is chosen.
2. final: each objective at its rate, with other seeds. Accuracy is measured on test prompts.
3. ablation: changes of one ESPO setting, at ESPO's rate and with the final seeds.

All runs have the same rollouts and optimizer steps. One run goes on each core at the same time. A
finished run is not repeated. A failed or interrupted run starts again with the next call.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent))
import study_sums
from compare_report import EVERY, Run, choose_rates, read_run, write_results

ROOT = Path(__file__).resolve().parents[1]
OBJECTIVES = ("espo", "gspo", "grpo", "dapo", "cispo", "gmpo")
RATES = (1e-5, 3e-5, 1e-4)
TUNING_SEED, FINAL_SEEDS, STEPS = 1, (2, 3, 4), 300
# Settings by section. The fixed range is about the mean of Eq. 8 here: 0.02 x 0.07 nats / ln 17.
ABLATIONS: dict[str, dict[str, dict]] = {
    "espo-one-group": {"algorithm": {"quantiles": []}},
    "espo-fixed-clip": {"algorithm": {"alpha": 1e-9, "clip_floor": 5e-4}},
    "espo-rho-0.1": {"algorithm": {"quantiles": [0.9]}},
    "espo-rho-0.4": {"algorithm": {"quantiles": [0.6]}},
    "espo-alpha-0.005": {"algorithm": {"alpha": 0.005}},
    "espo-alpha-0.1": {"algorithm": {"alpha": 0.1}},
    "espo-updates-2": {"algorithm": {"num_mini_batches": 2}},
    "espo-updates-8": {"algorithm": {"num_mini_batches": 8}},
    "espo-one-step-off": {
        "algorithm": {"rollout_correction": "token"}, "rollout": {"max_staleness": 1},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One run of the study."""

    phase: str
    variant: str
    rate: float
    seed: int
    steps: int
    out: Path

    @property
    def folder(self) -> Path:
        return self.out / f"{self.phase}-{self.variant}-{self.rate:g}-{self.seed}"

    def settings(self) -> dict:
        """Return the configuration of the run."""
        task = self.out / "sums"
        split = "validation" if self.phase == "tuning" else "test"
        changes = ABLATIONS.get(self.variant, {})
        objective = {"objective": self.variant.partition("-")[0], "num_mini_batches": 4}
        rollout = {
            "prompts_per_step": 16, "group_size": 8,
            "max_response_tokens": study_sums.RESPONSE_TOKENS, "max_model_len": 64,
            "canary_prompts": 0, "verify_every": 0,
            "engine_args": {"kv_cache_memory_bytes": 2**28, "max_num_seqs": 256},
        }  # fmt: skip
        return {
            "run": {
                "dir": str(self.folder), "steps": self.steps, "seed": self.seed,
                "checkpoint_every": None, "save_hf": False, "samples_per_step": 0,
            },
            "model": {"path": str(task), "dtype": "float32"},
            "megatron": {"max_tokens_per_micro_batch": 8192},
            "optimizer": {"lr": self.rate},
            "algorithm": objective | changes.get("algorithm", {}),
            "rollout": rollout | changes.get("rollout", {}),
            "data": {"prompts": str(task / "train.jsonl"), "raw": True},
            "reward": {"function": "examples.study_sums:correct", "workers": 1},
            "eval": {"prompts": str(task / f"{split}.jsonl"), "every": EVERY, "samples": 1},
        }  # fmt: skip

    def finished(self) -> bool:
        """Whether the run is complete. SystemExit: it was made with other settings."""
        # A run that is stopped in its last step has a summary but no evaluation.
        if not all((self.folder / name).is_file() for name in ("summary.json", "eval.jsonl")):
            return False
        if yaml.safe_load(self.file(".yaml").read_text()) != self.settings():
            sys.exit(
                f"{self.file('.yaml')}: not the settings of this call; change --out or remove it"
            )
        return True

    def start(self, core: int) -> subprocess.Popen:
        """Start the run from its beginning on one core."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.file(".yaml").write_text(yaml.safe_dump(self.settings(), sort_keys=False))
        command = ["taskset", "--cpu-list", str(core), sys.executable, "-m", "megatron_espo"]
        defaults = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment = defaults | os.environ | {"OMP_NUM_THREADS": "1"}
        with self.file(".log").open("w") as log:
            return subprocess.Popen(
                [*command, "train", str(self.file(".yaml"))],
                cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def result(self) -> Run:
        return read_run(self.phase, self.variant, self.rate, self.seed, self.folder)

    def file(self, suffix: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}{suffix}")


def tuning(args: argparse.Namespace) -> list[Job]:
    """Return the runs of the first phase."""
    steps = args.steps // 3
    return [
        Job("tuning", objective, rate, TUNING_SEED, steps, args.out)
        for rate in RATES
        for objective in args.objectives
    ]


def final(args: argparse.Namespace, rates: dict[str, float]) -> list[Job]:
    """Return the runs of the second and third phase, seed by seed."""
    objectives, ablations = [], []
    for seed in args.seeds:
        for objective in args.objectives:
            job = Job("final", objective, rates[objective], seed, args.steps, args.out)
            objectives.append(job)
        if "espo" in args.objectives:
            espo = Job("ablation", "espo", rates["espo"], seed, args.steps // 3, args.out)
            ablations += [replace(espo, variant=variant) for variant in ABLATIONS]
    return objectives + ablations


def run_all(jobs: list[Job], cores: list[int], report: Callable[[], None]) -> list[Job]:
    """Run the unfinished jobs, one on each core at a time. Return the failed jobs."""
    waiting = [job for job in jobs if not job.finished()]
    print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are finished", flush=True)
    running: dict[int, tuple[Job, subprocess.Popen, float]] = {}
    failed, done, began = [], 0, time.monotonic()
    steps = sum(job.steps for job in waiting)
    try:
        while waiting or running:
            for core in cores:
                if core not in running and waiting:
                    job = waiting.pop(0)
                    running[core] = (job, job.start(core), time.monotonic())
            time.sleep(0.5)
            for core, (job, process, started) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[core]
                done += job.steps
                failed += [job] if process.returncode else []
                left = (time.monotonic() - began) / done * (steps - done) / 60
                took = time.monotonic() - started
                print(f"{outcome(job)}, {took:.0f} s; about {left:.0f} min left", flush=True)
                report()
    finally:
        for _, process, _ in running.values():
            process.terminate()
            process.wait()
    return failed


def outcome(job: Job) -> str:
    if not job.finished():
        return f"{job.folder.name}: FAILED, see {job.file('.log')}"
    return f"{job.folder.name}: accuracy {job.result().last('accuracy'):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(FINAL_SEEDS))
    parser.add_argument("--steps", type=int, default=STEPS, help="of a final run; others: a third")
    parser.add_argument("--out", type=lambda path: Path(path).absolute(), default="runs/study")
    parser.add_argument(
        "--page", type=Path, help="Markdown file; the part between its marks is replaced"
    )
    args = parser.parse_args()
    if TUNING_SEED in args.seeds:
        parser.error(f"--seeds: {TUNING_SEED} is the seed of the tuning")
    if args.steps % (3 * EVERY):
        parser.error(f"--steps: expected a multiple of {3 * EVERY}, got {args.steps}")
    began, start = time.monotonic(), datetime.now()
    args.out.mkdir(parents=True, exist_ok=True)
    study_sums.prepare(args.out / "sums")
    cores = sorted(os.sched_getaffinity(0))
    jobs = tuning(args)

    record = args.out / "sittings.json"

    def results() -> str:
        """Write the results so far."""
        runs = [job.result() for job in jobs if job.finished()]
        sittings = json.loads(record.read_text())
        return write_results(runs, sittings, args.page or args.out / "study.md")

    def report() -> None:
        sittings = json.loads(record.read_text()) if record.exists() else {}
        sittings[start.isoformat(" ", "minutes")] = time.monotonic() - began
        record.write_text(json.dumps(sittings))
        results()

    failed = run_all(jobs, cores, report)
    if not failed:
        jobs += final(args, choose_rates([job.result() for job in jobs]))
        failed = run_all(jobs, cores, report)
    print(results())
    sys.exit(f"{len(failed)} runs failed; the same command tries them again" if failed else 0)


if __name__ == "__main__":
    main()
