"""A run's folder has one owner at a time."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from megatron_espo.errors import InputError
from megatron_espo.trainer import run_lock as module
from megatron_espo.trainer.run_lock import run_lock

HOLD = """
import sys, time
from pathlib import Path
from megatron_espo.trainer import run_lock
run_lock.LEASE_S = float(sys.argv[2])
with run_lock.run_lock(Path(sys.argv[1])):
    print("owner", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def short_lease(monkeypatch):
    monkeypatch.setattr(module, "LEASE_S", 1.0)


def start(folder, lease_s: float = 1.0) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLD, str(folder), str(lease_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_second_run_is_refused_and_the_third_starts(tmp_path):
    with run_lock(tmp_path):
        with pytest.raises(InputError, match=rf"process {os.getpid()} on {socket.gethostname()}"):
            with run_lock(tmp_path):
                pass
    with run_lock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LEASE_S", 60.0)
    owner = start(tmp_path, 60.0)
    assert owner.stdout.readline() == "owner\n"
    owner.kill()
    owner.wait()
    began = time.monotonic()
    with run_lock(tmp_path):
        assert time.monotonic() - began < 20
    assert not list(tmp_path.iterdir())


def test_another_host_is_believed_while_its_heartbeat_changes(tmp_path):
    """The same process under another host name: nobody can look whether it is alive."""
    owner = start(tmp_path)
    assert owner.stdout.readline() == "owner\n"
    path = tmp_path / "run.lock"
    with path.open("r+") as file:  # the same inode, which the owner refreshes
        text = file.read().replace(socket.gethostname(), "another")
        file.seek(0)
        file.truncate()
        file.write(text)
    try:
        with pytest.raises(InputError, match=f"process {owner.pid} on another"):
            with run_lock(tmp_path):
                pass
        os.kill(owner.pid, signal.SIGSTOP)  # no more heartbeats
        with run_lock(tmp_path):
            assert f"{os.getpid()}" in path.read_text()
    finally:
        owner.kill()
        owner.communicate()


def test_of_many_starters_one_owns_the_folder(tmp_path):
    """All of them find the lock of a process that was killed."""
    dead = start(tmp_path)
    assert dead.stdout.readline() == "owner\n"
    dead.kill()
    dead.communicate()
    starters = [start(tmp_path) for _ in range(4)]
    deadline = time.monotonic() + 60
    while sum(one.poll() is None for one in starters) > 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sum(one.poll() is None for one in starters) == 1
    for one in starters:
        one.kill()
        one.communicate()
