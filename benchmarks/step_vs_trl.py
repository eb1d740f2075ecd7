"""Seconds of an optimizer step on CPU: megatron_espo and TRL's GRPOTrainer.

    python benchmarks/step_vs_trl.py --model models/SmolLM2-135M-Instruct

Both train the same float32 model on the same prompts in the same order, with the same reward: 16
prompts x 4 responses of at most 20 tokens, one optimizer step a batch. megatron_espo: two
data-parallel ranks, rollouts by vLLM, the whole ESPO step with weight sync. TRL: one process with
all threads, generation by transformers (its vLLM modes need a GPU). Runs alternate, the first step
of each run is dropped, and the medians are compared. Exit code 1: above half of TRL's median.

TRL is installed once into its own virtual environment (`--trl-env`), which uses the packages of
this environment and adds only missing ones. Measure on an idle machine.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from statistics import median

from addition import write_prompts

HERE = Path(__file__).resolve().parent
TRL = "trl==1.16.0"
PROMPTS, GROUP, TOKENS, RANKS = 16, 4, 20, 2


def make_trl_env(folder: Path) -> Path:
    """Interpreter of a virtual environment with TRL on top of this environment's packages."""
    python = folder / "bin" / "python"
    if not list(folder.glob("lib/python*/site-packages/trl")):
        print(f"benchmark: installing {TRL} into {folder}", flush=True)
        venv = [sys.executable, "-m", "venv", "--without-pip", "--clear", folder]
        subprocess.run(venv, check=True)
        (site,) = folder.glob("lib/python*/site-packages")
        site.joinpath("zz-parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-m", "pip", "install", "-qq", TRL], check=True)
    return python


def run_trl(python: Path, args: argparse.Namespace, prompts: Path, folder: Path) -> list[float]:
    """Seconds of each of TRL's steps."""
    options = {
        "model": args.model, "prompts": prompts, "steps": args.steps, "prompts-per-step": PROMPTS,
        "group-size": GROUP, "max-response-tokens": TOKENS, "micro-batch": args.trl_micro_batch,
        "output": folder,
    }  # fmt: skip
    command = [python, HERE / "trl_grpo.py", *(f"--{k}={v}" for k, v in options.items())]
    output = execute(command, folder.with_suffix(".log"), os.cpu_count())
    report = json.loads(output.splitlines()[-1])
    import torch
    import transformers

    for module in (torch, transformers):
        version = report["versions"][module.__name__]
        assert version == module.__version__, f"TRL runs {module.__name__} {version}"
    return report["seconds"]


def run_ours(args: argparse.Namespace, prompts: Path, folder: Path) -> list[float]:
    """Seconds of each of our steps, from the metrics that the trainer writes."""
    config = {
        "run": {"dir": str(folder), "steps": args.steps, "seed": 1, "save_hf": False},
        "model": {"path": args.model, "dtype": "float32"},
        "megatron": {"max_tokens_per_micro_batch": 2048},
        "optimizer": {"lr": 1e-5},
        "algorithm": {"num_mini_batches": 1},
        "rollout": {
            "prompts_per_step": PROMPTS, "group_size": GROUP, "max_response_tokens": TOKENS,
            "max_model_len": 128,
        },
        "data": {"prompts": str(prompts), "shuffle": False},
        "reward": {"function": "benchmarks.addition:reward"},
    }  # fmt: skip
    path = folder.with_suffix(".yaml")
    path.write_text(json.dumps(config))  # JSON is YAML
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {RANKS}".split()
    command = [sys.executable, *torchrun, "-m", "megatron_espo", "train", path]
    execute(command, folder.with_suffix(".log"), max(1, os.cpu_count() // RANKS))
    rows = folder.joinpath("metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["time/step_s"] for row in rows]


def execute(command: list, log: Path, threads: int) -> str:
    """Standard output of ``command``. Standard error goes to ``log``; a failure prints its end."""
    paths = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    env |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": paths}
    with log.open("w") as errors:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=HERE.parent, env=env, stdout=subprocess.PIPE, stderr=errors, text=True,
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
    parser.add_argument("--steps", type=int, default=4, help="of each run; the first is dropped")
    micro_batch = "responses in TRL's forward and backward"
    parser.add_argument("--trl-micro-batch", type=int, default=64, help=micro_batch)
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
                if name == "trl":
                    steps = run_trl(python, args, prompts, folder)
                else:
                    steps = run_ours(args, prompts, folder)
                shown = " ".join(f"{step:.1f}" for step in steps)
                print(f"{name:>5} run {number + 1}: {shown} s", flush=True)
                seconds[name] += steps[1:]
    trl, ours = (median(values) for values in seconds.values())
    ratio = ours / trl
    print(f"median step: trl {trl:.2f} s, ours {ours:.2f} s, ratio {ratio:.3f} (limit 0.5)")
    return int(ratio > 0.5)


if __name__ == "__main__":
    sys.exit(main())
