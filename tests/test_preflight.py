"""``doctor --cluster`` under gloo; two torchruns on this host stand for two nodes."""

import os
import socket
import subprocess
import sys

from megatron_espo.cli import main as command_line
from megatron_espo.tools import preflight
from megatron_espo.tools.doctor import BROKEN
from tests.support.distributed import ROOT, run_ranks


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_two_nodes_pass_and_leave_no_files(tmp_path):
    """One rank on the first node, two on the second, as where an engine uses GPUs of the first."""
    port, env = str(free_port()), os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    nodes = []
    for rank in (0, 1):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        command += [f"--node-rank={rank}", f"--nproc-per-node={rank + 1}"]
        command += ["--master-addr=127.0.0.1", f"--master-port={port}"]
        command += ["-m", "megatron_espo", "doctor", "--cluster", "--folder", str(tmp_path)]
        nodes.append(subprocess.Popen(command, cwd=ROOT, env=env, **options))
    texts = [node.communicate(timeout=600)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    lines = texts[0].splitlines()
    assert [line.split(" ... ")[0] for line in lines if " ... " in line] == list(preflight.CHECKS)
    assert lines[-1] == "Fit for a run." and list(tmp_path.iterdir()) == []
    speed = next(line for line in lines if line.startswith("network bandwidth"))
    assert float(speed.split(": ")[1].split()[0]) > 0 and "over gloo" in speed


def test_every_check_finds_its_fault():
    """Only rank 1 has the fault; both ranks must return the same row."""
    rows = run_ranks(2, "tests.support.ranks.preflight:faults")
    states = {name: [row["state"] for row in both] for name, both in rows.items()}
    assert states == {name: [BROKEN, BROKEN] for name in states}
    texts = {name: f"{both[0]['found']} -> {both[0]['advice']}" for name, both in rows.items()}
    assert all(first == second for first, second in rows.values())
    assert "torch 0.0.1, not" in texts["versions"] and "on node1" in texts["versions"]
    assert "1 ranks, 0 GPUs on node1" in texts["gpu"]
    assert "none on any node on node1" in texts["no gpu"]
    assert "ulimit -n 128" in texts["files"] and "on node1" in texts["files"]
    assert "no file of node" in texts["folder"] and "on node0, node1" in texts["folder"]
    assert "wrong sums on node1" in texts["bandwidth"]


def test_it_needs_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert command_line(["doctor", "--cluster"]) == 2
