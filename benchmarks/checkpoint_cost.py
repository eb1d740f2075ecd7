"""Seconds of a step with and without a checkpoint, and seconds to save and load a run's state,
compared with a plain write of the same bytes with fsync.

    torchrun --nproc-per-node 2 benchmarks/checkpoint_cost.py --model MODEL --folder FOLDER

First come pairs of training steps; the second of each pair starts a save, as the training loop does
it, and completes the save if its files are written at the end of the step.

Each round saves through ``Actor.save`` (weights, Adam's moments, checksums, fsync, rename), then
writes files of the same sizes by plain ``write`` and ``fsync``, every rank a part of each, and then
loads. FOLDER should be on the disk that a run would use.
"""

import argparse
import gc
import os
import shutil
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from measure import seconds

from megatron_espo.config import Algorithm, Config, Data, Model, Optimizer, Rollout, Run
from megatron_espo.config.checks import check_model, read_model
from megatron_espo.data.packing import TrainSequence
from megatron_espo.distributed import runtime as distributed_runtime
from megatron_espo.megatron.actor import Actor


def make_actor(model: str, folder: Path) -> Actor:
    """An actor after one update, so that Adam's moments exist."""
    config = Config(
        run=Run(dir=str(folder)),
        model=Model(path=model, dtype="float32"),
        optimizer=Optimizer(lr=1e-6),
        algorithm=Algorithm(num_mini_batches=1),
        rollout=Rollout(prompts_per_step=2, group_size=2, max_response_tokens=4),
        data=Data(prompts="reasoning_gym:none"),
    )
    runtime = distributed_runtime.initialize(**distributed_runtime.parallel_sizes(config.megatron))
    actor = Actor(config, check_model(config, read_model(config)), runtime)
    actor.update(make_groups(2, 2), lambda done, total: None)
    gc.freeze()  # as the training loop
    return actor


def make_groups(sequences: int, tokens: int) -> list[list[TrainSequence]]:
    """Prompts with two responses of ``tokens`` tokens each."""
    ids, logprobs = list(range(3, 3 + tokens)), [-1.0] * tokens
    return [
        [TrainSequence([1, 2 + i], ids, logprobs, a) for a in (1.0, -1.0)]
        for i in range(sequences // 2)
    ]


def collective_seconds(work) -> float:
    """Seconds of ``work`` until the last rank is done."""
    dist.barrier()
    return seconds(lambda: (work(), dist.barrier()))


def step_pairs(actor: Actor, folder: Path, rounds: int, groups: list) -> tuple[list, list, int]:
    """Seconds of steps without and with a checkpoint; saves that were complete within the step."""
    plain, saving, complete = [], [], 0

    def step() -> None:
        actor.update(groups, lambda done, total: None)

    def step_and_save() -> None:
        save = actor.save(folder / f"step{number}", {})
        step()
        if save.is_written():
            save.finish()
        else:
            running.append(save)

    for number in range(rounds):
        running: list = []
        plain.append(collective_seconds(step))
        saving.append(collective_seconds(step_and_save))
        complete += not running
        for save in running:
            save.finish()
        if dist.get_rank() == 0:
            shutil.rmtree(folder / f"step{number}")
    return plain, saving, complete


def write_plainly(sizes: list[int], folder: Path, source: torch.Tensor) -> None:
    """Write this rank's part of each file, as its own file, with fsync."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks, view = dist.get_world_size(), memoryview(source.numpy())
    for number, size in enumerate(sizes):
        left = -(-size // ranks)
        with open(folder / f"{dist.get_rank()}-{number}", "wb", buffering=0) as file:
            while left:
                left -= file.write(view[: min(left, len(view))])
            os.fsync(file.fileno())


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--folder", required=True, type=Path, help="a new folder; removed at the end"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=32, help="of a step")
    parser.add_argument("--tokens", type=int, default=128, help="of a response")
    args = parser.parse_args()
    actor = make_actor(args.model, args.folder)
    source = torch.randint(0, 256, (64 << 20,), dtype=torch.uint8)
    groups = make_groups(args.sequences, args.tokens)
    plain_steps, saving_steps, complete = step_pairs(actor, args.folder, args.rounds, groups)
    times: dict[str, list[float]] = {"plain": [], "save": [], "load": []}
    for number in range(args.rounds):
        out, plain = args.folder / str(number), args.folder / "plain"
        times["save"].append(collective_seconds(lambda out=out: actor.save(out, {}).finish()))
        sizes = [file.stat().st_size for file in sorted(out.iterdir())]
        work = lambda sizes=sizes, plain=plain: write_plainly(sizes, plain, source)  # noqa: E731
        times["plain"].append(collective_seconds(work))
        times["load"].append(collective_seconds(lambda out=out: actor.load(out)))
        if dist.get_rank() == 0:
            shutil.rmtree(out)
            shutil.rmtree(plain)
    if dist.get_rank() == 0:
        pairs = list(zip(plain_steps, saving_steps, strict=True))
        print("steps without, with a save:", ", ".join(f"{a:.2f} {b:.2f} s" for a, b in pairs))
        ratio = median(b / a for a, b in pairs)
        print(f"with / without: median {ratio:.2f}; {complete} saves complete within the step")
        print(f"{dist.get_world_size()} ranks, {sum(sizes) / 1e9:.2f} GB in {len(sizes)} files")
        for name, values in times.items():
            rounds = ", ".join(f"{value:.2f}" for value in values)
            print(f"{name:6} median {median(values):6.2f} s   all: {rounds}")
        print(f"save / plain: {median(times['save']) / median(times['plain']):.2f}")
        shutil.rmtree(args.folder)
    distributed_runtime.shutdown()


if __name__ == "__main__":
    main()
