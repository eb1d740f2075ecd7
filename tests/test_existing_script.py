"""The example script learns, and its first step does not depend on tensor parallelism."""

import os
import re
import subprocess
import sys

import pytest

from tests.support.distributed import ROOT

SCRIPT = "examples/existing_megatron_script.py"
LINE = re.compile(r"^step +(\d+)  reward ([\d.]+)  grad norm ([\d.]+)$", re.MULTILINE)


def run(*launcher: str) -> list[tuple[float, float]]:
    """Run the script; return (reward, gradient norm) of each step."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, SCRIPT]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=720)
    assert done.returncode == 0, done.stderr[-4000:]
    steps = LINE.findall(done.stdout)
    assert [int(step) for step, _, _ in steps] == list(range(1, 21)), done.stdout
    return [(float(reward), float(norm)) for _, reward, norm in steps]


@pytest.fixture(scope="module")
def one_rank():
    return run()


@pytest.fixture(scope="module")
def two_ranks():
    return run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.parametrize("ranks", ["one_rank", pytest.param("two_ranks", marks=pytest.mark.slow)])
def test_reward_rises(ranks, request):
    """By much more than the noise of one step, about 0.5 / sqrt(1024 tokens) = 0.016."""
    rewards = [reward for reward, _ in request.getfixturevalue(ranks)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15, rewards


@pytest.mark.slow
def test_first_step_does_not_depend_on_tensor_parallelism(one_rank, two_ranks):
    assert one_rank[0][0] == two_ranks[0][0]
    assert one_rank[0][1] == pytest.approx(two_ranks[0][1], rel=1e-4)
