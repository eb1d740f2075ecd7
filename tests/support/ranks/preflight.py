"""Ranks of tests/test_preflight.py: run each check with a fault on rank 1."""

import resource
import tempfile
from dataclasses import asdict, replace
from importlib import metadata
from unittest.mock import patch

import torch
import torch.distributed as dist

from megatron_espo.tools import preflight
from megatron_espo.tools.preflight import Topology


def faults() -> dict[str, list[dict]]:
    """``{fault: [rank 0's row, rank 1's row]}``. Each rank is a node."""
    rank = dist.get_rank()
    topology = Topology(rank, ["node0", "node1"], [0, 1], [rank], torch.device("cpu"))
    limit, real_limit, real_sum = resource.RLIMIT_NOFILE, resource.getrlimit, dist.all_reduce

    def few_files(which):
        return (128, 128) if which == limit else real_limit(which)

    def wrong_sum(tensor, **kwargs):
        real_sum(tensor, **kwargs)
        tensor[-1] += 1

    with tempfile.TemporaryDirectory() as own:
        tried = {
            "versions": (
                preflight.versions_row,
                patch.object(metadata, "version", lambda name: "0.0.1"),
            ),
            "files": (preflight.limits_row, patch.object(resource, "getrlimit", few_files)),
            "folder": (preflight.folder_row, patch.object(preflight, "MIB", 1)),
            "bandwidth": (
                preflight.network_bandwidth_row,
                patch.object(dist, "all_reduce", wrong_sum),
            ),
        }
        with patch.object(preflight, "_find", lambda file, start: _find(file, start, 0.5)):
            rows = {
                name: _row(rank, check, fault, topology, own)
                for name, (check, fault) in tried.items()
            }
        with patch.object(torch.cuda, "get_device_name", lambda device: "H100"):
            device = torch.device("cuda", 0) if rank == 0 else torch.device("cpu")
            with patch.object(torch.cuda, "device_count", lambda: 1 - rank):
                rows["gpu"] = preflight._gather(
                    asdict(preflight.gpus_row(replace(topology, device=device), own))
                )
            gpu_topology = replace(topology, device=torch.device("cuda", 0))
            rows["memlock"] = preflight._gather(asdict(preflight.limits_row(gpu_topology, own)))
    return rows


_find = preflight._find


def _row(rank, check, fault, topology, own) -> list[dict]:
    if rank == 1:
        fault.start()
    row = check(topology, own)
    if rank == 1:
        fault.stop()
    return preflight._gather(asdict(row))
