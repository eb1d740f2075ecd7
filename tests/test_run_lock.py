"""A run's folder has one owner at a time."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from megatron_espo.errors import InputError
from megatron_espo.trainer import run_lock
from megatron_espo.trainer.run_lock import NAME, RunLock

HOLD = """
import sys, time
from megatron_espo.trainer.run_lock import RunLock
lock = RunLock(sys.argv[1])
print("owner", flush=True)
time.sleep(60)
"""


def test_the_second_run_is_refused_and_the_third_starts(tmp_path):
    with RunLock(tmp_path):
        with pytest.raises(InputError, match=rf"process {os.getpid()} on "):
            RunLock(tmp_path)
    with RunLock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "owner\n"
    with pytest.raises(InputError, match=f"process {owner.pid} "):
        RunLock(tmp_path)
    owner.kill()
    owner.wait()
    began = time.monotonic()
    with RunLock(tmp_path):
        assert time.monotonic() - began < 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_alive", [True, False])
def test_another_host_is_believed_while_its_heartbeat_changes(tmp_path, monkeypatch, is_alive):
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.1)
    path, ended = tmp_path / NAME, threading.Event()

    def beat():
        for number in range(100):
            if ended.wait(0.1):
                return
            path.with_suffix(".new").write_text(json.dumps(lock | {"heartbeat": number}))
            path.with_suffix(".new").replace(path)

    lock = {"host": "another", "pid": 1, "start": "boot:1", "heartbeat": 0}
    path.write_text(json.dumps(lock))
    thread = threading.Thread(target=beat)
    if not is_alive:
        with RunLock(tmp_path):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        return
    thread.start()
    try:
        with pytest.raises(InputError, match="process 1 on another"):
            RunLock(tmp_path)
    finally:
        ended.set()
        thread.join()


def test_of_many_starters_one_owns_the_folder(tmp_path):
    """All of them find a stale lock."""
    with RunLock(tmp_path):
        dead = json.loads((tmp_path / NAME).read_text()) | {"start": None}
    (tmp_path / NAME).write_text(json.dumps(dead))
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    starters = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    time.sleep(0.1)
    deadline = time.monotonic() + 60
    while sum(one.poll() is None for one in starters) > 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sum(one.poll() is None for one in starters) == 1
    for one in starters:
        one.kill()
        one.communicate()
