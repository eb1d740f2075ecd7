"""Compares trajectories."""

from typing import Any

import numpy as np


def values_of(found: Any) -> Any:
    """Values to compare, of a trajectory or of nested lists of them; without routed experts and
    sampling masks.
    """
    if isinstance(found, list | tuple):
        return [values_of(each) for each in found]
    values = vars(found) | {"earlier": values_of(found.earlier)}
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in values.items()
        if name not in ("routed_experts", "sampling_mask")
    }
