"""Compares two runs, bit for bit."""

import json
import zipfile
from pathlib import Path

from megatron_espo.files import read_jsonl

# The engine sleeps, and all trainer state moves to the host.
TURNS = ["rollout.sleep=true", "megatron.offload=[optimizer,gradients,weights]"]


def assert_same_run(run: Path, other: Path, *apart: str) -> None:
    """The runs have equal rollouts, metrics (except seconds, memory and ``apart``), last
    checkpoints and exported weights.
    """
    assert recorded(run) == recorded(other) != {}
    assert metrics(run, apart) == metrics(other, apart)
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


def recorded(run: Path) -> dict[str, dict[str, bytes]]:
    """Members of the archive of each step."""
    found = {}
    for path in sorted((run / "rollouts").glob("step_*.npz")):
        with zipfile.ZipFile(path) as archive:
            found[path.name] = {name: archive.read(name) for name in archive.namelist()}
    return found


def metrics(run: Path, apart: tuple[str, ...]) -> list[dict]:
    lines = read_jsonl(run / "metrics.jsonl")
    others = ("time/", "throughput/", "system/", *apart)
    return [
        {name: value for name, value in line.items() if not name.startswith(others)}
        for line in lines
    ]
