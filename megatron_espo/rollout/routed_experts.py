"""Records in a worker which experts each token was routed to, for a CPU build of vLLM."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from vllm.forward_context import get_forward_context

from megatron_espo.rollout.vllm_patches import record_routed_experts

_MAX_FINISHED = 4096


class RoutedExpertsRecord:
    """The routers' choices for every token whose keys and values are in the cache.

    The record is indexed by key-value slot. A prompt token that another request computed (prefix
    caching) therefore has the choices with which its keys and values were computed. Chunked prompts
    and preempted requests need no special treatment.

    Args:
        runner: vLLM's model runner on a CPU, with an allocated cache.

    Raises:
        ValueError: the model has no supported routers, or its layers have several kinds of cache.
    """

    def __init__(self, runner: Any) -> None:
        model, groups = runner.vllm_config.model_config, runner.kv_cache_config.kv_cache_groups
        if len(groups) != 1:
            raise ValueError(f"routed experts: expected one kind of cache, got {len(groups)}")
        self._runner, self._layer = runner, groups[0].layer_names[0]
        self._block_size = groups[0].kv_cache_spec.block_size
        slots = runner.kv_cache_config.num_blocks * self._block_size
        shape = slots, model.get_total_num_hidden_layers(), model.get_num_experts_per_tok()
        self._rows = np.zeros(shape, np.uint8 if model.get_num_experts() <= 256 else np.uint16)
        self._finished: OrderedDict[str, np.ndarray] = OrderedDict()
        record_routed_experts(runner, self, self._keep)

    def capture(self, layer_id: int, topk_ids: torch.Tensor) -> None:
        """Store a router's ``[tokens, top_k]`` choices. Called in every forward pass."""
        slots = get_forward_context().slot_mapping[self._layer].numpy()
        used = slots >= 0
        self._rows[slots[used], layer_id] = topk_ids.numpy()[used]

    def take(self, request_id: str, count: int) -> np.ndarray | None:
        """``[count, layers, top_k]`` experts of a request's first tokens; zeros in dense layers.

        Removes the request from the record. ``None``: the request or some tokens are unknown.
        """
        name = _internal_name(request_id, self._finished)
        if name is None:
            name = _internal_name(request_id, self._runner.requests)
            if name is None:
                return None
            self._keep(name)
        rows = self._finished.pop(name)
        return rows[:count] if len(rows) >= count else None

    def _keep(self, name: str) -> None:
        """Copy a request's rows before vLLM reuses its slots."""
        if name not in self._runner.requests:
            return
        blocks = np.array(self._runner.requests[name].block_ids[0], dtype=np.int64)
        slots = (blocks[:, None] * self._block_size + np.arange(self._block_size)).reshape(-1)
        self._finished[name] = self._rows[slots]
        while len(self._finished) > _MAX_FINISHED:  # clients that disconnected never take theirs
            self._finished.popitem(last=False)


def _internal_name(request_id: str, names: Iterable[str]) -> str | None:
    """vLLM's internal name of a request: the request id and a random suffix."""
    return next((name for name in names if name.rpartition("-")[0] == request_id), None)
