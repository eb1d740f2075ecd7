"""Save and restore the random number states of a rank, as JSON in a checkpoint."""

import base64
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_espo.files import write_durably


def save_rng(folder: Path) -> None:
    """Write the states of torch, the device, Megatron's tracker, Python and NumPy durably."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    states = {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
    }
    write_durably(_file(folder, dist.get_rank()), json.dumps(states, default=_encode) + "\n")


def load_rng(folder: Path) -> None:
    """Restore this rank's states. Changes nothing if another number of ranks wrote them."""
    ranks = dist.get_world_size()
    if not _file(folder, ranks - 1).is_file() or _file(folder, ranks).is_file():
        return
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    states: dict[str, Any] = json.loads(_file(folder, dist.get_rank()).read_text())
    torch.set_rng_state(_decode(states["torch"]))
    torch.cuda.set_rng_state(_decode(states["device"]))
    tracker = {name: _decode(text) for name, text in states["tracker"].items()}
    get_cuda_rng_tracker().set_states(tracker)
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


def _encode(state: torch.Tensor | np.ndarray) -> Any:
    if isinstance(state, np.ndarray):
        return state.tolist()
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rng_{rank:05d}.json"
