"""Seconds for one optimisation step on CPU: megatron_espo beside TRL's GRPOTrainer. Exits with 1 above half of TRL's.

Both train the same float32 model on the same prompts in the same order, with the same reward: 16 prompts x 4 responses
of at most 20 tokens, one optimizer step a batch. Ours: two data-parallel ranks, rollouts by vLLM, the whole ESPO step
with weight sync. TRL's: one process with all threads, generation by transformers (its vLLM modes need a GPU). Runs
alternate, each run's first step is dropped, and the medians are compared.

    python benchmarks/step_vs_trl.py --model models/SmolLM2-135M-Instruct

TRL goes into a virtual environment of its own (`--trl-env`, made once) that sees this one's packages and adds only what
is missing; this environment stays as it is. Measure on an idle machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from addition import write_prompts

HERE = Path(__file__).resolve().parent
TRL = "trl==1.16.0"
PROMPTS, GROUP, TOKENS, RANKS = 16, 4, 20, 2


def make_trl_env(folder: Path) -> Path:
    """The interpreter of a virtual environment with TRL over this environment's packages; made if absent."""
    python = folder / "bin" / "python"
    if not list(folder.glob("lib/python*/site-packages/trl")):
        print(f"benchmark: installing {TRL} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", folder], check=True)
        (site,) = folder.glob("lib/python*/site-packages")
        site.joinpath("zz-parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-m", "pip", "install", "-qq", TRL], check=True)
    return python


def environment(threads: int) -> dict[str, str]:
    """This process's environment, offline, with ``threads`` OpenMP threads for each process."""
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    own = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | own | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run_trl(python: Path, args: argparse.Namespace, prompts: Path, folder: Path) -> list[float]:
    """Seconds of each of TRL's steps."""
    command = [python, HERE / "trl_grpo.py", "--model", args.model, "--prompts", prompts, "--steps", args.steps]
    command += ["--prompts-per-step", PROMPTS, "--group-size", GROUP, "--max-response-tokens", TOKENS]
    command += ["--micro-batch", args.trl_micro_batch, "--output", folder]
    output = execute(command, folder.with_suffix(".log"), os.cpu_count())
    report = json.loads(output.splitlines()[-1])
    import torch
    import transformers

    for module in (torch, transformers):
        assert report["versions"][module.__name__] == module.__version__, f"TRL runs another {module.__name__}"
    return report["seconds"]


def run_ours(args: argparse.Namespace, prompts: Path, folder: Path) -> list[float]:
    """Seconds of each of our steps, from the metrics that the trainer writes."""
    config = {
        "run": {"dir": str(folder), "steps": args.steps, "seed": 1, "save_hf": False},
        "model": {"path": args.model, "dtype": "float32"},
        "megatron": {"max_tokens_per_micro_batch": 2048},
        "optimizer": {"lr": 1e-5},
        "rollout": {
            "prompts_per_step": PROMPTS, "group_size": GROUP, "max_response_tokens": TOKENS, "max_model_len": 128,
        },
        "data": {"prompts": str(prompts), "shuffle": False},
        "reward": {"function": "benchmarks.addition:reward"},
    }  # fmt: skip
    path = folder.with_suffix(".yaml")
    path.write_text(json.dumps(config))  # JSON is YAML
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", RANKS]
    command += ["-m", "megatron_espo.cli", "train", path]
    execute(command, folder.with_suffix(".log"), max(1, os.cpu_count() // RANKS))
    rows = [json.loads(line) for line in folder.joinpath("metrics.jsonl").read_text().splitlines()]
    return [row["time/step_s"] for row in rows]


def execute(command: list, log: Path, threads: int) -> str:
    """Standard output of ``command``; standard error goes to ``log``, whose end is shown if the command fails."""
    with log.open("w") as errors:
        done = subprocess.run(
            [str(word) for word in command], cwd=HERE.parent, env=environment(threads), stdout=subprocess.PIPE,
            stderr=errors, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        tail = f"{done.stdout[-2000:]}\n{log.read_text()[-4000:]}"
        sys.exit(f"benchmark: {command[1:3]} failed with {done.returncode}:\n{tail}")
    return done.stdout


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each trainer, alternating")
    parser.add_argument("--steps", type=int, default=4, help="steps of each run; the first is dropped")
    parser.add_argument("--trl-micro-batch", type=int, default=64, help="responses in TRL's forward and backward")
    parser.add_argument("--trl-env", type=Path, default=HERE.parent / "build" / "trl-env")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps: expected at least 2 (the first step is dropped)")

    args.model = str(Path(args.model).absolute())
    python = make_trl_env(args.trl_env.absolute())
    seconds: dict[str, list[float]] = {"trl": [], "ours": []}
    with tempfile.TemporaryDirectory(prefix="step-vs-trl-") as scratch:
        prompts = Path(scratch, "prompts.jsonl")
        write_prompts(prompts, PROMPTS * args.steps, seed=1)
        for number in range(args.rounds):
            for name in seconds:
                folder = Path(scratch, f"{name}-{number}")
                steps = run_trl(python, args, prompts, folder) if name == "trl" else run_ours(args, prompts, folder)
                print(f"{name:>5} run {number + 1}: {' '.join(f'{value:.1f}' for value in steps)} s", flush=True)
                seconds[name] += steps[1:]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["ours"] / medians["trl"]
    print(f"median step: trl {medians['trl']:.2f} s, ours {medians['ours']:.2f} s, ratio {ratio:.3f} (limit 0.5)")
    return int(ratio > 0.5)


if __name__ == "__main__":
    sys.exit(main())
