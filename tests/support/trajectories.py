"""Makes and compares trajectories."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megatron_espo.types import Prompt, Trajectory


def single_turn(
    prompt: Prompt,
    token_ids: ArrayLike,
    logprobs: ArrayLike,
    version: ArrayLike,
    finish_reason: str,
    text: str,
    **attributes: Any,
) -> Trajectory:
    """A trajectory of one sampled turn after ``prompt.token_ids``.

    Args:
        token_ids, logprobs: ``[T]``, of the sampled tokens.
        version: policy version of all tokens, or ``[T]`` of each token.
        attributes: values of further attributes.
    """
    ids = np.asarray(token_ids)
    return Trajectory(
        prompt=prompt,
        prompt_ids=np.array(prompt.token_ids, np.int32),
        response_ids=ids,
        loss_mask=np.ones(len(ids), np.bool_),
        logprobs=np.asarray(logprobs),
        versions=np.full(len(ids), version, np.int32),
        finish_reason=finish_reason,
        text=text,
        turns=np.zeros(min(1, len(ids)), np.int32),
        **attributes,
    )


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
