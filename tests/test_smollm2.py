"""A real pretrained model, SmolLM2-135M-Instruct: logits against transformers, and the engine's log-probs against the trainer's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.distributed import ROOT, run_ranks


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The quickstart's model folder; made as the quickstart makes it."""
    folder = ROOT / "models" / "SmolLM2-135M-Instruct"
    subprocess.run([sys.executable, "tools/prepare_smollm2.py", str(folder)], cwd=ROOT, check=True)
    return folder


@pytest.mark.parametrize("nproc", [1, 2])
def test_logits_equal_transformers(smollm2, nproc):
    answer = run_ranks(nproc, "tests.ranks.smollm2:logit_difference", folder=str(smollm2), pipeline=nproc)
    assert answer < 1e-3


@pytest.mark.slow
def test_engine_and_trainer_agree_in_bfloat16_at_temperature_0_7(smollm2, tmp_path):
    """Two steps of the quickstart's program: mean |Δ log-prob| of sampled tokens after the first sync and after a trained one.

    Rounding to bfloat16 moves either side by 0.02 from the float32 value; stale weights would give 0.2.
    """
    config = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())
    config["model"] = {"path": str(smollm2), "dtype": "bfloat16"}
    config["run"] = {"dir": str(tmp_path / "run"), "steps": 2, "save_hf": False}
    config["rollout"] |= {"prompts_per_step": 8, "temperature": 0.7}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "megatron_espo", "train", str(tmp_path / "run.yaml")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    gaps = [json.loads(line).get("mismatch/logprob_gap_mean") for line in (tmp_path / "run/metrics.jsonl").open()]
    gaps = [gap for gap in gaps if gap is not None]
    assert gaps and max(gaps) < 4e-2, gaps
