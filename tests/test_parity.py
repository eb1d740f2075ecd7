"""``megatron-espo parity``: layouts agree; a gradient that differs is named; exit codes."""

import math
import subprocess
import sys

import pytest
import torch

from megatron_espo import cli
from megatron_espo.tools.parity.cases import CP, EP, LAYOUTS, PP, SHORT_LAYOUTS, TP
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
    torch.save(right | {name: right[name] * 1.0003}, file)
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
    gradients = torch.load(recorded / "dense" / "espo.pt")
    assert len(gradients) > 40 and all(tensor.any() for tensor in gradients.values())


def test_recorded_batch_is_off_policy(recorded, tmp_path):
    sequences = load_sequences(recorded / "dense" / "batch.json")
    save_sequences(tmp_path / "again.json", sequences)
    assert (tmp_path / "again.json").read_text() == (recorded / "dense" / "batch.json").read_text()
    assert any(len(s.response_ids) == 1 for s in sequences)
    assert len({s.prompt_ids[0] for s in sequences}) == 4
    plain = make_sequences(517, 256)
    logprobs = [torch.full((len(s.response_ids),), -float(torch.rand(()) + 1)) for s in plain]
    scored = [torch.stack([new, torch.ones_like(new)]) for new in logprobs]
    drifted = drift(plain, scored, 517)
    moved = [
        float((torch.from_numpy(s.old_logprobs) - new).abs().max())
        for s, new in zip(drifted, logprobs, strict=True)
    ]
    assert min(moved) > 0 and max(moved) > 0.2


def test_a_configuration_that_does_not_exist_is_named(capsys):
    assert cli.main(["parity", "run.steps=3"]) == 2
    assert "error: run.steps=3: expected a YAML configuration file" in capsys.readouterr().err


def test_ranks_of_the_layouts():
    """TP x PP x CP, or PP x EP x the TP of its experts; data parallelism has two ranks."""
    for layout in LAYOUTS.values():
        tp, pp, cp, ep = (layout.sizes.get(key, 1) for key in (TP, PP, CP, EP))
        assert layout.ranks == max(2, pp * math.lcm(tp * cp, tp * ep)), layout
        assert layout.has_experts == ("ep" in layout.name)
