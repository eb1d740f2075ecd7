"""The short version of :mod:`tests.faults.soak`."""

import pytest

from tests.faults.runs import Runs
from tests.faults.soak import EVERY, soak


@pytest.mark.slow
def test_a_run_with_random_faults_ends_as_the_undisturbed_one(tmp_path):
    runs = Runs.prepare(tmp_path, steps=21, every=EVERY)
    done = runs.train("undisturbed")
    assert done.returncode == 0, done.stdout + done.stderr
    soak(runs, runs.weights("undisturbed"), faults=2, seed=3)
