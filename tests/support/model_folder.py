"""Writes weight files without values, and without torch."""

import json
import math
import os
from pathlib import Path
from typing import Any

from megatron_espo.models.registry import read_spec

BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1, "F8_E4M3": 1}


def write_tensors(file: Path, tensors: dict[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    """Write a sparse safetensors file of zeros."""
    header, end = {}, 0
    for name, shape in tensors.items():
        begin, end = end, end + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)


def write_weights(folder: Path, hf_config: dict[str, Any]) -> None:
    """Write ``model.safetensors`` of a model with this ``config.json``."""
    write_tensors(folder / "model.safetensors", read_spec(hf_config).tensor_shapes)
