"""``megatron-espo parity``: layouts agree; a gradient that differs is named; exit codes."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_espo import cli
from megatron_espo.tools.parity.cases import LAYOUTS, SHORT, Selection
from megatron_espo.tools.parity.recorded import (
    drift,
    load_sequences,
    make_sequences,
    save_sequences,
)
from tests.support.distributed import ROOT

PARITY = ["-m", "megatron_espo", "parity"]


def run(*arguments: str, ranks: int = 0) -> subprocess.CompletedProcess:
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {ranks}".split()
    command = [sys.executable, *(torchrun if ranks else []), *PARITY, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)


def test_short_matrix_agrees():
    done = run("--short", "--ranks", "2")
    rows = [line for line in done.stdout.splitlines() if line.startswith(("dense", "moe"))]
    assert done.returncode == 0, done.stdout + done.stderr
    for name in SHORT["layouts"]:
        assert sum(f" {name} " in row for row in rows) == 2 * 2, name
    assert len(rows) == len(SHORT["layouts"]) * 2 * 2 and "DIFFERS" not in done.stdout


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    done = run("--record", "--folder", str(folder), "--layouts", "tp2", "--objectives", "espo")
    assert done.returncode == 0, done.stderr
    return folder


def test_gradient_that_differs_is_named(recorded):
    """One tensor of the reference is changed by a factor of 1.0003."""
    file, name = recorded / "dense" / "espo.safetensors", "model.layers.2.mlp.up_proj.weight"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name] * 1.0003}, file)
    choice = ["--layouts=tp2", "--micro-batches=packed", "--objectives=espo"]
    done = run("--folder", str(recorded), *choice, ranks=2)
    save_file(tensors, file)
    assert done.returncode != 0
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("dense")]
    assert row.endswith(f"3.0e-04  {name}  DIFFERS") and "1 DIFFER;" in done.stdout


def test_comparing_nothing_is_not_agreement(recorded):
    done = run("--folder", str(recorded), "--layouts", "tp2", ranks=1)
    assert done.returncode != 0 and "NOTHING was compared" in done.stdout


def test_recorded_gradients_are_not_zero(recorded):
    gradients = load_file(recorded / "dense" / "espo.safetensors")
    assert all(tensor.any() for tensor in gradients.values())


def test_recorded_batch_is_off_policy(recorded, tmp_path):
    sequences = load_sequences(recorded / "dense" / "batch.json")
    save_sequences(tmp_path / "again.json", sequences)
    assert (tmp_path / "again.json").read_text() == (recorded / "dense" / "batch.json").read_text()
    assert any(len(s.response_ids) == 1 for s in sequences)
    assert len({s.prompt_ids[0] for s in sequences}) == 4
    plain = make_sequences(517, 256)
    logprobs = [[-float(torch.rand(()) + 1)] * len(s.response_ids) for s in plain]
    drifted = drift(plain, logprobs, [[1.0] * len(s.response_ids) for s in plain], 517)
    moved = [
        max(abs(o - n) for o, n in zip(s.old_logprobs, p, strict=True))
        for s, p in zip(drifted, logprobs, strict=True)
    ]
    assert min(moved) > 0 and max(moved) > 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layouts", "tp2,tp3"], "--layouts: expected some of tp2, tp2 sp, "),
        (["--objectives", "ppo"], "--objectives: expected some of espo, gspo, grpo, gmpo; got ppo"),
        (["--micro-batches", "3"], "--micro-batches: expected some of 1, 2, 4, packed; got 3"),
        (["run.steps=3"], "expected a CONFIG.yaml before overrides, got 'run.steps=3'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    assert cli.main(["parity", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_layouts_that_fit():
    everything = Selection(tuple(layout.name for layout in LAYOUTS), (), ())
    names = {
        w: [x.name for x in everything.of_world(w, has_experts=False)] for w in (1, 2, 3, 4, 8)
    }
    assert names[1] == [] and names[3] == ["dp2"]
    assert names[2] == ["tp2", "tp2 sp", "pp2", "pp2 vpp2", "cp2", "dp2"]
    assert names[4] == names[8] == [*names[2], "tp2 pp2", "tp2 cp2"]
    assert [x.name for x in everything.of_world(2, has_experts=True)] == ["ep2"]
