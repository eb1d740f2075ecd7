"""Compares two runs.

On some CPUs the last bit of a log-prob of vLLM differs between equal runs. These log-probs, and the
metrics that are computed from them, are compared with a tolerance; everything else bit for bit.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_espo.files import read_jsonl

# The engine sleeps, and all trainer state moves to the host.
TURNS = ["rollout.sleep=true", "megatron.offload=[optimizer,gradients,weights]"]

OF_ENGINE = ("mismatch/", "rollout_correction/")


def assert_same_run(run: Path, other: Path, *apart: str) -> None:
    """The runs have equal rollouts, metrics (except seconds, memory and ``apart``), last
    checkpoints and exported weights.
    """
    assert_same_rollouts(run, other)
    for line, expected in zip(metrics(run, apart), metrics(other, apart), strict=True):
        close = {name: pytest.approx(v, rel=1e-5, abs=1e-7) for name, v in expected.items()}
        assert line == {n: close[n] if n.startswith(OF_ENGINE) else v for n, v in expected.items()}
    assert shards(run) == shards(other) != {}
    assert exported(run) == exported(other) != {}


def shards(run: Path) -> dict[str, str]:
    """Digests of the shards of the last checkpoint."""
    folder = run / "checkpoints"
    manifest = folder / (folder / "latest").read_text().strip() / "megatron_espo.json"
    files = json.loads(manifest.read_text())["files"]
    return {name: digest for name, digest in files.items() if name.endswith(".distcp")}


def exported(run: Path) -> dict[str, bytes]:
    """Exported weights."""
    return {file.name: file.read_bytes() for file in (run / "hf").glob("*.safetensors")}


def assert_same_rollouts(run: Path, other: Path) -> None:
    """Compare the archives of all steps."""
    names = [path.name for path in sorted((run / "rollouts").glob("step_*.npz"))]
    assert names == [path.name for path in sorted((other / "rollouts").glob("step_*.npz"))] != []
    for name in names:
        with np.load(run / "rollouts" / name) as one, np.load(other / "rollouts" / name) as two:
            assert one.files == two.files
            for member in one.files:
                if member == "logprobs":
                    np.testing.assert_allclose(one[member], two[member], rtol=0, atol=1e-6)
                else:
                    np.testing.assert_array_equal(one[member], two[member], member)


def metrics(run: Path, apart: tuple[str, ...]) -> list[dict]:
    lines = read_jsonl(run / "metrics.jsonl")
    others = ("time/", "throughput/", "system/", *apart)
    return [
        {name: value for name, value in line.items() if not name.startswith(others)}
        for line in lines
    ]
