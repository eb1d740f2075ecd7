"""Seconds to save and to load a run's state, beside writing the same bytes with fsync.

    torchrun --standalone --nproc-per-node 2 benchmarks/checkpoint_cost.py --model models/SmolLM2-135M-Instruct --folder /scratch/cost

Each round saves through ``Learner.save`` (weights, Adam's moments, checksums, fsync, rename) and then writes files of the same sizes by plain ``write`` and
``fsync``, every rank a part of them. The folder should lie on the disk that a run would use.
"""

import argparse
import os
import shutil
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_espo.config import Config, Data, Model, Optimizer, Rollout, Run
from megatron_espo.data.packing import TrainSequence
from megatron_espo.mcore import runtime as mcore_runtime
from megatron_espo.mcore.learner import Learner
from megatron_espo.mcore.model import read_hf_config
from megatron_espo.progress import Phases


def make_learner(model: str, folder: Path) -> Learner:
    """A learner that has made one update, so that there are moments."""
    config = Config(
        run=Run(dir=str(folder)),
        model=Model(path=model, dtype="float32"),
        optimizer=Optimizer(lr=1e-6),
        rollout=Rollout(prompts_per_step=2, group_size=2, max_response_tokens=4),
        data=Data(prompts="reasoning_gym:none"),
    )
    runtime = mcore_runtime.initialize(**mcore_runtime.parallel_sizes(config.megatron))
    learner = Learner(config, read_hf_config(model), runtime)
    groups = [[TrainSequence([1, 2], [3 + i], [-1.0], a) for a in (1.0, -1.0)] for i in range(2)]
    with Phases(draw=False).phase("train", 1, 1) as on_progress:
        learner.update(groups, on_progress)
    return learner


def timed(work) -> float:
    """Seconds of a collective piece of work, until the last rank is done."""
    dist.barrier()
    began = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - began


def write_plainly(sizes: list[int], folder: Path, source: torch.Tensor) -> None:
    """This rank's part of each file, as one file of its own, with fsync."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks, view = dist.get_world_size(), memoryview(source.numpy())
    for number, size in enumerate(sizes):
        left = -(-size // ranks)
        with open(folder / f"{dist.get_rank()}-{number}", "wb", buffering=0) as file:
            while left:
                left -= file.write(view[: min(left, len(view))])
            os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--folder", required=True, type=Path, help="an empty or new folder; removed at the end")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    learner = make_learner(args.model, args.folder)
    source = torch.randint(0, 256, (64 << 20,), dtype=torch.uint8)
    seconds: dict[str, list[float]] = {"plain": [], "save": [], "load": []}
    for number in range(args.rounds):
        out = args.folder / str(number)
        seconds["save"].append(timed(lambda out=out: learner.save(out, {})))
        sizes = [file.stat().st_size for file in sorted(out.iterdir())]
        seconds["load"].append(timed(lambda out=out: learner.load(out)))
        dist.barrier()
        plain = args.folder / "plain"
        seconds["plain"].append(timed(lambda sizes=sizes, plain=plain: write_plainly(sizes, plain, source)))
        if dist.get_rank() == 0:
            shutil.rmtree(out)
            shutil.rmtree(plain)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks, {sum(sizes) / 1e9:.2f} GB in {len(sizes)} files")
        for name, values in seconds.items():
            print(f"{name:6} median {statistics.median(values):6.2f} s   all: {', '.join(f'{value:.2f}' for value in values)}")
        print(f"save / plain: {statistics.median(seconds['save']) / statistics.median(seconds['plain']):.2f}")
        shutil.rmtree(args.folder)
    mcore_runtime.shutdown()


if __name__ == "__main__":
    main()
