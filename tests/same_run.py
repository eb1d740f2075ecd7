"""Two runs that should have been the same, bit for bit."""

import json
import zipfile
from pathlib import Path

# The engine sleeps, and all that can leave the trainer's devices leaves.
TURNS = ["rollout.sleep=true", "megatron.offload=[optimizer,gradients,weights]"]


def assert_same_run(run: Path, other: Path, *apart: str) -> None:
    """Equal rollouts (log-probs too), metrics (but for seconds, memory and those ``apart``), last checkpoints (weights, optimizer) and exported weights."""
    assert recorded(run) == recorded(other) != {}
    assert metrics(run, apart) == metrics(other, apart)
    checkpoints = [folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip() for folder in (run, other)]
    digests = [json.loads((folder / "megatron_espo.json").read_text())["files"] for folder in checkpoints]
    shards = [{name: digest for name, digest in files.items() if name.endswith(".distcp")} for files in digests]
    assert shards[0] == shards[1] and shards[0]
    exported = [{file.name: file.read_bytes() for file in (folder / "hf").glob("*.safetensors")} for folder in (run, other)]
    assert exported[0] == exported[1] and exported[0]


def recorded(run: Path) -> dict[str, dict[str, bytes]]:
    """Members of each step's archive."""
    found = {}
    for path in sorted((run / "rollouts").glob("step_*.npz")):
        with zipfile.ZipFile(path) as archive:
            found[path.name] = {name: archive.read(name) for name in archive.namelist()}
    return found


def metrics(run: Path, apart: tuple[str, ...]) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    others = ("time/", "throughput/", "system/", *apart)
    return [{name: value for name, value in line.items() if not name.startswith(others)} for line in lines]
