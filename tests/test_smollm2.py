"""SmolLM2-135M-Instruct: logits against transformers, and log-probs of the engine against the
trainer.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_espo.files import read_jsonl
from tests.support.distributed import ROOT, run_ranks
from tests.test_end_to_end import run_training


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The model folder of the quickstart."""
    folder = ROOT / "models" / "SmolLM2-135M-Instruct"
    subprocess.run([sys.executable, "tools/prepare_smollm2.py", str(folder)], cwd=ROOT, check=True)
    return folder


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_logits_equal_transformers(smollm2, nproc):
    answer = run_ranks(
        nproc, "tests.support.ranks.smollm2:logit_difference", folder=str(smollm2), pipeline=nproc
    )
    assert answer < 1e-3


@pytest.mark.slow
def test_engine_and_trainer_agree_in_bfloat16_at_temperature_0_7(smollm2, tmp_path):
    """Two steps of the quickstart: mean log-prob gap of sampled tokens after the first and the
    second weight update.

    Rounding to bfloat16 changes each side by 0.02; stale weights give 0.2.
    """
    config = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())
    config["model"] = {"path": str(smollm2), "dtype": "bfloat16"}
    config["run"] = {"dir": str(tmp_path / "run"), "steps": 2, "save_hf": False}
    config["rollout"] |= {"prompts_per_step": 8, "temperature": 0.7}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = run_training(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    name = "mismatch/logprob_gap_mean"
    gaps = [x[name] for x in read_jsonl(tmp_path / "run/metrics.jsonl") if name in x]
    assert gaps and max(gaps) < 4e-2, gaps
