"""Measures the host work of one step at the size of the paper: what rank 0 and every rank do in
Python between engine and GPU.

    python benchmarks/host_path.py [--prompts 128] [--group 8] [--mean 8192] [--dp 2] [--steps 3]

Lengths are log-normal and cut at ``--limit``. The script times the package's own functions, without
the time of the network, and prints wall and CPU seconds of the main thread. Rows "every rank" are
those of a rank that receives its share; the total of rank 0 counts them too. Rank 0 writes the
rollout log in the background while its rows run; before them the same write runs alone. The other
ranks have no log: their total is that of a second pass without it. The last line is that of the
last step; the first step of a process takes longer, because its memory is new.
"""

import argparse
import gc
import os
import pickle
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
from megatron_espo.data.packing import (
    PackingSpec,
    TrainSequence,
    batch_totals,
    pack,
    shard_by_tokens,
)
from megatron_espo.data.rollout_store import RolloutLog
from megatron_espo.data.scored_groups import ScoredGroups, from_outline, to_outline
from megatron_espo.distributed.checksum import array_checksum
from megatron_espo.megatron.consistency import data_fingerprints
from megatron_espo.monitoring.metrics import rollout_metrics
from megatron_espo.trainer.train import train_sequences
from megatron_espo.types import Prompt, Trajectory

rows: list[tuple[str, float, float]] = []


def timed(name: str, work: Callable[[], Any]) -> Any:
    wall, cpu = time.perf_counter(), time.thread_time()
    result = work()
    rows.append((name, time.perf_counter() - wall, time.thread_time() - cpu))
    print(f"{name:46s} {rows[-1][1]:8.3f} s {rows[-1][2]:8.3f} s CPU", flush=True)
    return result


def rss_gib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**30


def make_groups(args: argparse.Namespace) -> ScoredGroups:
    draw = np.random.default_rng(0)
    drawn = draw.lognormal(np.log(args.mean) - 0.32, 0.8, (args.prompts, args.group))
    rollouts = []
    for i, lengths in enumerate(drawn.clip(16, args.limit).astype(int).tolist()):
        prompt = Prompt(f"p{i}", "x" * 800, "1", tuple(draw.integers(1000, 128000, 200).tolist()))
        group = []
        for length in lengths:
            ids, logprobs = draw.integers(1000, 128000, length), -draw.random(length)
            rest = np.ones(length, np.bool_), logprobs, np.zeros(length, np.int32)
            text = "y" * (4 * length)
            context, turns = np.array(prompt.token_ids), np.zeros(1, np.int32)
            group.append(Trajectory(prompt, context, ids, *rest, "stop", text, turns))
        rollouts.append(group)
    rewards = torch.tensor(draw.integers(0, 2, (args.prompts, args.group)).astype("float32"))
    return ScoredGroups(rollouts, rewards, args.prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {"prompts": 128, "group": 8, "mean": 8192, "limit": 16384, "dp": 2, "steps": 3}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    gc.freeze()  # as the training loop
    groups = make_groups(args)
    total = int(groups.lengths().sum())
    fields = ("response_ids", "loss_mask", "logprobs", "versions")
    arrays = sum(getattr(s, name).nbytes for s in groups.samples for name in fields) / 2**30
    before = rss_gib()
    print(
        f"{len(groups.samples)} responses, {total:,} tokens, mean {total / len(groups.samples):.0f}"
    )
    print(f"{arrays:.3f} GiB of arrays; {before:.2f} GiB before the measurement")
    with tempfile.TemporaryDirectory() as folder:
        log, states = RolloutLog(Path(folder), {"x": 1}), {"before": {}, "after": {}}
        alone = Path(folder, "alone.npz")
        for step in range(1, args.steps + 1):
            print(f"\nstep {step}")
            timed("background: rollout log, alone", lambda: log._write(alone, groups, states))
            _, write_s, write_cpu_s = rows[0]
            rows.clear()
            size = sum(f.stat().st_size for f in Path(folder).iterdir()) / 2**20
            print(f"   {size:.0f} MiB on disk")
            timed("rollout log: start", lambda: log.write(1, groups, **states))
            measure(args, groups, total)
            log.wait()
            whole, whole_cpu = (sum(row[i] for row in rows) for i in (1, 2))
            rows.clear()
            print("\nwithout the rollout log, as another rank")
            measure(args, groups, total)
            every, every_cpu = (sum(r[i] for r in rows if "every rank" in r[0]) for i in (1, 2))
            rows.clear()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(
                f"background: rollout log {write_s:.2f} s alone, {write_cpu_s:.2f} s CPU; rows: "
                f"{whole_cpu:.2f} s CPU on rank 0, {every_cpu:.2f} s on every other rank; "
                f"peak extra memory {(peak - before) / arrays:.1f} x the arrays\n"
                f"TOTAL {whole:.2f} s on rank 0, of which {every:.2f} s on every rank; "
                f"{1e6 * whole / total:.3f} us a token; peak RSS {peak:.1f} GiB"
            )
        log.close()


def measure(args: argparse.Namespace, groups: ScoredGroups, total: int) -> None:
    responses = len(groups.samples)
    message = timed("outline: send", lambda: pickle.dumps(to_outline(groups)))
    print(f"   {len(message) / 2**20:.1f} MiB")
    outline = timed("outline: receive (every rank)", lambda: from_outline(pickle.loads(message)))
    advantages = group_advantages(groups.rewards)

    def sequences_of(groups: ScoredGroups) -> list[TrainSequence]:
        return [s for group in train_sequences(groups, advantages, False) for s in group]

    sequences = timed("sequences", lambda: sequences_of(groups))
    received = timed("sequences (every rank)", lambda: sequences_of(outline))
    kept = [i for i in range(responses) if sequences[i].advantage]
    rank = args.dp - 1
    shards = timed(
        "shares (every rank)",
        lambda: shard_by_tokens([received[i] for i in kept], args.dp),
    )
    shares = [[kept[i] for group in shard for i in group] for shard in shards]

    def send() -> bytes:
        for share in shares:
            data = pickle.dumps([sequences[i] for i in share])
            array_checksum(np.frombuffer(data, np.uint8))
        return data

    def receive() -> None:
        array_checksum(np.frombuffer(data, np.uint8))
        for i, sequence in zip(shares[rank], pickle.loads(data), strict=True):
            received[i] = sequence

    data = timed(f"shares of {args.dp} data-parallel ranks: send", send)
    print(f"   {len(data) / 2**20:.0f} MiB each")
    timed("share: receive (every rank)", receive)
    trained = [received[i] for i in kept]
    totals = batch_totals(trained, num_responses=responses, num_response_tokens=total)
    spec = PackingSpec(18432, rank, args.dp, multiple_of=8)
    batches = timed(f"pack (every rank, dp {args.dp})", lambda: pack(trained, totals, spec))
    one, two = (SimpleNamespace(rank=lambda: 0, size=lambda size=size: size) for size in (1, 2))
    place = SimpleNamespace(dp=one, cp=one, pp=one, tp=two)
    timed("checksums (every rank)", lambda: data_fingerprints(received, batches, place))
    timed("rollout metrics", lambda: rollout_metrics(groups.rollouts, groups.rewards, advantages))


if __name__ == "__main__":
    main()
