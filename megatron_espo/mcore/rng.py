"""Random number states of a rank: torch's, Python's, NumPy's, the device's and Megatron's tracker, as JSON in a checkpoint."""

import base64
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_espo.run_files import write_durably


def save_rng(folder: Path) -> None:
    """Write this rank's states into ``folder``, durably. Zero collectives."""
    write_durably(_file(folder, dist.get_rank()), json.dumps(_states()) + "\n")


def load_rng(folder: Path) -> bool:
    """Restore this rank's states; False, and nothing changed, where another number of ranks wrote them."""
    ranks = dist.get_world_size()
    if not _file(folder, ranks - 1).is_file() or _file(folder, ranks).is_file():
        return False
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    states = json.loads(_file(folder, dist.get_rank()).read_text())
    torch.set_rng_state(_tensor(states["torch"]))
    torch.cuda.set_rng_state(_tensor(states["device"]))
    get_cuda_rng_tracker().set_states({name: _tensor(text) for name, text in states["tracker"].items()})
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    return True


def _states() -> dict[str, Any]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    kind, keys, *rest = np.random.get_state()
    return {
        "torch": _text(torch.get_rng_state()),
        "device": _text(torch.cuda.get_rng_state()),
        "tracker": {name: _text(state) for name, state in get_cuda_rng_tracker().get_states().items()},
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
    }


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rng_{rank:05d}.json"
