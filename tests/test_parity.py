"""``megatron-espo parity``: layouts agree; a gradient that differs is named; exit codes."""

import subprocess
import sys

import pytest
import torch

from megatron_espo import cli
from megatron_espo.tools.parity.cases import LAYOUTS, SHORT_LAYOUTS
from megatron_espo.tools.parity.recorded import (
    drift,
    load_sequences,
    make_sequences,
    save_sequences,
)
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
    gradients = right["gradients"] | {name: right["gradients"][name] * 1.0003}
    torch.save(right | {"gradients": gradients}, file)
    done = run("--short", "--folder", str(recorded), "--layout=tp2", ranks=2)
    torch.save(right, file)
    assert done.returncode != 0
    rows = [line for line in done.stdout.splitlines() if line.startswith("dense")]
    differ = [row for row in rows if row.endswith(f"3.0e-04  {name}  DIFFERS")]
    assert len(rows) == 4 and differ == [row for row in rows if " espo " in row]
    assert "2 DIFFER;" in done.stdout


def test_comparing_nothing_is_not_agreement(recorded):
    done = run("--short", "--folder", str(recorded), "--layout", "tp2", ranks=1)
    assert done.returncode != 0 and "NOTHING was compared" in done.stdout


def test_recorded_gradients_are_not_zero(recorded):
    gradients = torch.load(recorded / "dense" / "espo.pt")["gradients"]
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


def test_a_configuration_that_does_not_exist_is_named(capsys):
    assert cli.main(["parity", "run.steps=3"]) == 2
    assert "error: run.steps=3: expected a YAML configuration file" in capsys.readouterr().err


def test_layouts_that_fit():
    names = {
        world: [x.name for x in LAYOUTS.values() if not x.moe and x.fits(world)]
        for world in (1, 2, 3, 4, 8)
    }
    assert names[1] == [] and names[3] == ["dp2"]
    assert names[2] == ["tp2", "tp2 sp", "pp2", "pp2 vpp2", "cp2", "dp2"]
    assert names[4] == names[8] == [*names[2], "tp2 pp2", "tp2 cp2"]
    assert [x.name for x in LAYOUTS.values() if x.moe and x.fits(2)] == ["ep2"]
