"""One undisturbed run for all tests of this folder."""

import pytest
from safetensors.torch import load_file

from tests.faults.runs import Runs

STEPS, EVERY = 6, 2


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Runs:
    return Runs.prepare(tmp_path_factory.mktemp("faults"), steps=STEPS, every=EVERY)


@pytest.fixture(scope="session")
def undisturbed(runs):
    """Its final weights."""
    done = runs.train("undisturbed")
    assert done.returncode == 0, done.stdout + done.stderr
    assert runs.status("undisturbed")["state"] == "done"
    kept = sorted(p.name for p in (runs.folder / "undisturbed" / "checkpoints").iterdir())
    assert kept == ["latest", "step_000004", "step_000006"]
    final = runs.weights("undisturbed")
    start = load_file(runs.folder / "model" / "model.safetensors")
    assert any((final[name].float() - start[name]).abs().max() > 1e-3 for name in final), (
        "nothing was trained"
    )
    return final
