"""Ranks of tests/test_preflight.py: run each check with a fault on rank 1."""

import os
import resource
import tempfile
from dataclasses import asdict, replace
from importlib import metadata
from unittest.mock import patch

import torch
import torch.distributed as dist

from megatron_espo.tools import preflight
from megatron_espo.tools.preflight import Cluster


def faults() -> dict[str, list[dict]]:
    """``{fault: [rank 0's row, rank 1's row]}``. Each rank is a node."""
    rank = dist.get_rank()
    real_limit, real_sum = resource.getrlimit, dist.all_reduce

    def few_files(which):
        return (128, 128) if which == resource.RLIMIT_NOFILE else real_limit(which)

    def wrong_sum(tensor, **kwargs):
        real_sum(tensor, **kwargs)
        tensor[-1] += 1

    with tempfile.TemporaryDirectory() as own:
        cluster = Cluster(own, ["node0", "node1"], [rank], torch.device("cpu"), gpus=0)
        tried = {
            "versions": patch.object(metadata, "version", lambda name: "0.0.1"),
            "limits": patch.object(resource, "getrlimit", few_files),
            "folder": patch.object(preflight, "VISIBLE_S", 0.5),
            "network bandwidth": patch.object(dist, "all_reduce", wrong_sum),
        }
        names = ("versions", "files", "folder", "bandwidth")
        rows = {}
        for name, (check, fault) in zip(names, tried.items(), strict=True):
            if rank == 1 or check == "folder":
                fault.start()
            rows[name] = _row(preflight.CHECKS[check], cluster)
            if rank == 1 or check == "folder":
                fault.stop()
        with patch.object(torch.cuda, "get_device_name", lambda device: "H100"):
            slurm = {"SLURM_GPUS_ON_NODE": "8"} if rank else {}
            with patch.dict(os.environ, slurm):
                rows["no gpu"] = _row(preflight.gpus_row, cluster)
            rows["gpu"] = _row(preflight.gpus_row, replace(cluster, gpus=1 - rank))
    return rows


def _row(check, cluster) -> list[dict]:
    return preflight._gather(asdict(preflight.worst(check(cluster), cluster.hosts)))
