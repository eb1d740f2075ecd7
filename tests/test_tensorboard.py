"""TensorBoard of a short quickstart run in a headless browser: every documented tag has data, and
each page shows it.
"""

import re
import subprocess

import pytest

from tests.faults.runs import environment, torchrun
from tests.support.board import HARMLESS, PAGES, Board
from tests.support.browser import find_browser
from tests.support.distributed import ROOT
from tests.support.documented import NAMES, as_pattern, is_documented

# Only on GPUs, for mixtures of experts, or if training and sampling overlap.
ELSEWHERE = {
    "throughput/mfu",
    "system/gpu_memory_gib",
    "system/gpu_peak_allocated_gib",
    "time/wait_s",
    "reward/mean_<name>",
    *(name for name in NAMES if name.startswith(("moe/", "judge/"))),
}
TASK = "min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 2, seed: 99, size: 4"
EVERYTHING = [
    "run.steps=2",
    "run.save_hf=false",
    "run.checkpoint_every=null",
    "algorithm.kl_coef=0.001",
    "algorithm.num_mini_batches=2",
    "rollout.sleep=true",
    "megatron.offload=[optimizer, gradients]",
    "rollout.prompts_per_step=8",
    "rollout.verify_every=1",
    "eval.prompts=reasoning_gym:chain_sum",
    "eval.every=1",
    "eval.max_prompts=4",
    "eval.samples=2",
    f"eval.task_args={{{TASK}}}",
]


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    if find_browser() is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    if not (ROOT / "models" / "SmolLM2-135M-Instruct").exists():
        pytest.skip("no models/SmolLM2-135M-Instruct (examples/quickstart.sh)")
    folder = tmp_path_factory.mktemp("quickstart")
    command = [*torchrun(2), "-m", "megatron_espo", "train", "examples/quickstart.yaml"]
    command += [f"run.dir={folder}", *EVERYTHING]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with Board(folder) as board:
        yield board


@pytest.mark.slow
def test_every_documented_tag_has_data(board):
    (run,) = board.answer("/data/runs")
    tags = board.answer("/data/plugin/scalars/tags")[run]
    assert {
        name for name in NAMES if not any(re.fullmatch(as_pattern(name), tag) for tag in tags)
    } <= ELSEWHERE
    assert [tag for tag in tags if not is_documented(tag)] == []
    points = {
        tag: board.answer(f"/data/plugin/scalars/scalars?run={run}&tag={tag.replace('@', '%40')}")
        for tag in tags
    }
    assert min(map(len, points.values())) >= 1 and len(points["reward/mean"]) == 2


@pytest.mark.slow
def test_each_page_draws(board):
    for page, words in PAGES.items():
        board.show(page, words)
    assert [
        line for line in board.browser.complaints if not any(word in line for word in HARMLESS)
    ] == []
    assert all(address.startswith((board.address, "blob:")) for address in board.browser.requests)
