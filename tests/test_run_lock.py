"""A run's folder has one owner at a time."""

import os
import subprocess
import sys

import pytest

from megatron_espo.errors import InputError
from megatron_espo.trainer.status import locked

HOLD = """
import sys, time
from pathlib import Path
from megatron_espo.trainer.status import locked
with locked(Path(sys.argv[1])):
    print("owner", flush=True)
    time.sleep(60)
"""


def test_the_second_run_is_refused_and_the_third_starts(tmp_path):
    with locked(tmp_path):
        with pytest.raises(InputError, match=rf"process {os.getpid()} on "), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "owner\n"
    with pytest.raises(InputError, match=f"process {owner.pid} "), locked(tmp_path):
        pass
    owner.kill()
    owner.wait()
    with locked(tmp_path):
        pass
