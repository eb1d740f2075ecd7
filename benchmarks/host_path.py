"""Measures the host work of one step at the size of the paper: what rank 0 and every rank do in
Python between engine and GPU.

    python benchmarks/host_path.py [--prompts 128] [--group 8] [--tokens 7000] [--dp 2]

Every response has ``--tokens`` tokens. The script times the package's own functions and prints
seconds and peak memory.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from megatron_espo.algo import group_advantages
from megatron_espo.data.packing import PackingSpec, batch_totals, pack
from megatron_espo.data.rollout_store import RolloutLog
from megatron_espo.data.scored_groups import ScoredGroups, from_buffer, to_buffer
from megatron_espo.megatron.consistency import data_fingerprints
from megatron_espo.monitoring.metrics import rollout_metrics
from megatron_espo.trainer.train import train_sequences
from megatron_espo.types import Prompt, Trajectory

rows = []


def timed(name: str, work: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = work()
    rows.append((name, time.perf_counter() - start))
    print(f"{name:46s} {rows[-1][1]:8.2f} s", flush=True)
    return result


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def make_groups(args: argparse.Namespace) -> ScoredGroups:
    draw = np.random.default_rng(0)
    rollouts = []
    for i in range(args.prompts):
        prompt = Prompt(f"p{i}", "x" * 800, "1", tuple(draw.integers(1000, 128000, 200).tolist()))
        rollouts.append(
            [
                Trajectory.single_turn(
                    prompt,
                    draw.integers(1000, 128000, args.tokens),
                    -draw.random(args.tokens),
                    0,
                    "stop",
                    "y" * (4 * args.tokens),
                )
                for _ in range(args.group)
            ]
        )
    rewards = torch.tensor(draw.integers(0, 2, (args.prompts, args.group)).astype("float32"))
    return ScoredGroups(rollouts, rewards, args.prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("prompts", 128), ("group", 8), ("tokens", 7000), ("dp", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    groups = make_groups(args)
    responses = args.prompts * args.group
    total = responses * args.tokens
    print(f"{responses} responses, {total:,} tokens; {peak_gib():.1f} GiB before the measurement")
    with tempfile.TemporaryDirectory() as folder:
        log = RolloutLog(Path(folder), {"x": 1})
        timed("rollout log: write", lambda: log.write(1, groups, before={}, after={}))
        print(f"   {sum(f.stat().st_size for f in Path(folder).iterdir()) / 2**20:.0f} MiB on disk")
    header, buffer = timed("broadcast: to buffer", lambda: to_buffer(groups))
    print(f"   {len(buffer) / 2**20:.0f} MiB")
    timed("broadcast: from buffer (every rank)", lambda: from_buffer(header, buffer))
    advantages = group_advantages(groups.rewards)
    sequences = timed(
        "train_sequences (every rank)", lambda: train_sequences(groups, advantages, False)
    )
    flat = [sequence for group in sequences for sequence in group]
    kept = [sequence for sequence in flat if sequence.advantage]
    totals = batch_totals(kept, num_responses=responses, num_response_tokens=total)
    spec = PackingSpec(18432, 0, args.dp, multiple_of=8)
    batches = timed(f"pack (every rank, dp {args.dp})", lambda: pack(kept, totals, spec))
    one = SimpleNamespace(rank=lambda: 0)
    place = SimpleNamespace(dp=one, cp=one)
    timed("digests (every rank)", lambda: data_fingerprints(flat, batches, place))
    timed("rollout metrics", lambda: rollout_metrics(groups.rollouts, groups.rewards, advantages))
    whole = sum(seconds for _, seconds in rows)
    every = sum(seconds for name, seconds in rows if "every rank" in name)
    print(
        f"TOTAL {whole:.1f} s on rank 0, of which {every:.1f} s on every rank; "
        f"{1e6 * whole / total:.2f} us a token; peak RSS {peak_gib():.1f} GiB"
    )


if __name__ == "__main__":
    main()
