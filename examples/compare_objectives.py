"""Same model, prompts and seeds, four updates a rollout batch, one run for each objective: curves side by side in one picture.

    source tools/env.sh && python tools/prepare_smollm2.py models/SmolLM2-135M-Instruct
    python examples/compare_objectives.py                     # about an hour on two cores; goes on where it was stopped
    python examples/compare_objectives.py --seeds 1 2 3 run.steps=32

Every run is the quick start's with `algorithm.num_mini_batches=4`: the first of four optimizer steps is on-policy, the others are not, and clipping decides
what they may change. Runs that have a `summary.json` under the output folder are not repeated.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

from megatron_espo.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
OBJECTIVES = ("espo", "gspo", "grpo", "cispo")
MINI_BATCHES = 4
PANELS = {
    "reward/mean": "Reward",
    "policy/entropy": "Entropy of trained tokens (nats)",
    "policy/clipped": "Share of tokens outside their clip range",
    "with_gradient": "Share of tokens with a gradient",
}


def train(objective: str, seed: int, folder: Path, ranks: int, overrides: list[str]) -> None:
    """One run, unless it is there already."""
    if (folder / "summary.json").is_file():
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "megatron_espo", "train", str(ROOT / "examples" / "quickstart.yaml"), f"run.dir={folder}", f"run.seed={seed}"]
    command += [f"algorithm.objective={objective}", f"algorithm.num_mini_batches={MINI_BATCHES}", "run.save_hf=false", *overrides]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | os.environ
    subprocess.run(command, check=True, cwd=ROOT, env=environment)


def curve(folder: Path, name: str) -> list[float]:
    """One metric over a run's steps."""
    if name == "with_gradient":
        return [1 - line.get("policy/no_gradient", math.nan) for line in read_metrics(folder)]
    return [line.get(name, math.nan) for line in read_metrics(folder)]


def draw(folders: dict[str, list[Path]], path: Path) -> None:
    """A panel for each metric: the mean over seeds, and from the lowest to the highest seed as a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.8), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for objective, runs in folders.items():
            columns = list(zip(*(curve(run, name) for run in runs), strict=True))
            steps = range(1, len(columns) + 1)
            (line,) = axes.plot(steps, [fmean(column) for column in columns], label=objective.upper(), linewidth=1.5)
            axes.fill_between(steps, list(map(min, columns)), list(map(max, columns)), alpha=0.15, color=line.get_color())
        axes.set(title=title, xlabel="step", ylim=(0, None))
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--out", type=Path, default=Path("runs/compare_objectives"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of every run")
    args = parser.parse_args()
    runs = [(objective, seed) for objective in OBJECTIVES for seed in args.seeds]
    folders: dict[str, list[Path]] = {}
    for number, (objective, seed) in enumerate(runs, 1):
        folder = (args.out / f"{objective}-{seed}").absolute()
        print(f"[{number}/{len(runs)}] {objective}, seed {seed}: {folder}", flush=True)
        train(objective, seed, folder, args.ranks, args.overrides)
        folders.setdefault(objective, []).append(folder)
    draw(folders, args.out / "comparison.png")
    table = {
        objective: {name: round(fmean(v for run in runs for v in curve(run, name) if not math.isnan(v)), 4) for name in PANELS}
        | {"reward_last3": round(fmean(fmean(curve(run, "reward/mean")[-3:]) for run in runs), 4)}
        for objective, runs in folders.items()
    }
    (args.out / "comparison.json").write_text(json.dumps(table, indent=2) + "\n")
    print(f"{'objective':<10}" + "".join(f"{title:>42}" for title in [*PANELS.values(), "Reward, last three steps"]))
    for objective, values in table.items():
        print(f"{objective:<10}" + "".join(f"{value:>42.4f}" for value in values.values()))
    print(f"picture: {args.out / 'comparison.png'}")


if __name__ == "__main__":
    main()
