"""``megatron-espo parity``: layouts agree; a gradient that differs is named; exit codes."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_espo import cli
from megatron_espo.tools.parity.cases import SHORT_LAYOUTS
from megatron_espo.tools.parity.recorded import MODELS, drift, make_sequences, write_model
from tests.support.distributed import ROOT, run_command


def run(*arguments: str, ranks: int = 0) -> subprocess.CompletedProcess:
    """The command, which starts ranks itself with ``--ranks``, or on ``ranks`` ranks."""
    if ranks:
        return run_command(ranks, "parity", *arguments)
    command = [sys.executable, "-m", "megatron_espo", "parity", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_short_matrix_agrees():
    done = run("--short", "--ranks", "2")
    rows = [line for line in done.stdout.splitlines() if line.startswith(("dense", "moe"))]
    assert done.returncode == 0, done.stdout + done.stderr
    for name in SHORT_LAYOUTS:
        assert sum(f" {name} " in row for row in rows) == 2 * 2, name
    assert len(rows) == len(SHORT_LAYOUTS) * 2 * 2 and "DIFFERS" not in done.stdout


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    done = run("--short", "--folder", str(folder), "--layout", "tp2", ranks=2)
    assert done.returncode == 0, done.stdout
    return folder


def test_gradient_that_differs_is_named(recorded):
    """One tensor of the reference is changed by a factor of 1.0003."""
    file, name = recorded / "dense" / "espo.pt", "model.layers.2.mlp.up_proj.weight"
    right = torch.load(file)
    torch.save(right | {name: right[name] * 1.0003}, file)
    target = "tests.support.ranks.parity:compare"
    done = run_command(2, folder=str(recorded), layout="tp2", target=target)
    torch.save(right, file)
    assert done.returncode != 0
    rows = [line for line in done.stdout.splitlines() if line.startswith("dense")]
    differ = [row for row in rows if row.endswith(f"3.0e-04  {name}  DIFFERS")]
    assert len(rows) == 4 and differ == [row for row in rows if " espo " in row]
    assert "2 DIFFER;" in done.stdout


def test_a_layout_that_is_not_compared_fails(recorded):
    layouts = ["--layout=tp2", "--layout=tp2 pp2"]
    done = run("--short", "--folder", str(recorded), *layouts, ranks=2)
    assert done.returncode != 0 and "): tp2 pp2\n4 gradients on 2 ranks" in done.stdout
    assert cli.main(["parity", "--ranks=2", *layouts]) == 2


@pytest.fixture
def two_models(tmp_path):
    """A run's configuration, and folders of two models that differ in their weights."""
    for i, name in enumerate(("first", "second")):
        write_model(tmp_path / name, MODELS["dense"])
        file = tmp_path / name / "model.safetensors"
        save_file({n: t * (1 + 0.05 * i) for n, t in load_file(file).items()}, file)
        (tmp_path / name / "tokenizer.json").write_text("{}")
    sections = {
        "model": {"path": str(tmp_path / "first")},
        "megatron": {"transformer_impl": "local"},
        "rollout": {"max_response_tokens": 64},
        "data": {"prompts": "reasoning_gym:none"},
    }
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(sections))
    return str(file), f"model.path={tmp_path / 'second'}"


def test_each_command_records_its_own_model(two_models, tmp_path):
    """The folder has the reference of another model, of other layers and other objectives."""
    config, other = two_models
    options = ["--short", "--layout=dp2", "--folder", str(tmp_path / "folder")]
    for more in ([], [other, "--num-layers=2"]):
        done = run(config, *more, *options, ranks=2)
        assert done.returncode == 0, done.stdout
        assert "4 gradients on 2 ranks: all agree" in done.stdout
    assert cli.main(["parity", config, "--num-layers=5"]) == 2


def test_recorded_gradients_are_not_zero(recorded):
    gradients = torch.load(recorded / "dense" / "espo.pt")
    assert len(gradients) > 40 and all(tensor.any() for tensor in gradients.values())


def test_recorded_batch_is_off_policy():
    plain = make_sequences(517, 256)
    assert any(len(s.response_ids) == 1 for s in plain)
    assert len({s.prompt_ids[0] for s in plain}) == 4
    logprobs = [torch.full((len(s.response_ids),), -float(torch.rand(()) + 1)) for s in plain]
    scored = [torch.stack([new, torch.ones_like(new)]) for new in logprobs]
    drifted = drift(plain, scored, 517)
    moved = [
        float((torch.from_numpy(s.old_logprobs) - new).abs().max())
        for s, new in zip(drifted, logprobs, strict=True)
    ]
    assert min(moved) > 0 and max(moved) > 0.2
