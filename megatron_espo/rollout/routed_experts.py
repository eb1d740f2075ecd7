"""Which experts the engine sent each token to, where vLLM itself does not tell: a record kept by key-value slot, in a worker process.

vLLM returns them (``enable_return_routed_experts``) from its second model runner, which needs Triton. A CPU build without Triton has the first
one; its routers call the same hook, so the choices recorded here are those that the engine computed with.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import bind_routed_experts_capturer

_MOST_KEPT = 4096


class RoutedExpertsRecord:
    """Choices of every token whose keys and values are in the cache.

    They are written and found by key-value slot. So a prompt token that another request computed (prefix caching) has the choices that its keys
    and values came from, and chunks of a prompt, or tokens computed again after a preemption, need no care.

    Args:
        runner: vLLM's model runner, on a CPU, its cache allocated.

    Raises:
        ValueError: a model without experts, experts whose kernel chooses by itself, or layers with several kinds of cache.
    """

    def __init__(self, runner) -> None:
        model, cache = runner.vllm_config.model_config, runner.kv_cache_config
        if len(cache.kv_cache_groups) != 1:
            raise ValueError(f"Routed experts are recorded with one kind of key-value cache, got {len(cache.kv_cache_groups)}.")
        self._runner = runner
        self._layer = cache.kv_cache_groups[0].layer_names[0]
        self._block_size = cache.kv_cache_groups[0].kv_cache_spec.block_size
        shape = (cache.num_blocks * self._block_size, model.get_total_num_hidden_layers(), model.get_num_experts_per_tok())
        self._rows = np.zeros(shape, np.uint8 if model.get_num_experts() <= 256 else np.uint16)
        self._finished: OrderedDict[str, np.ndarray] = OrderedDict()
        update_states = runner._update_states

        def keep_finished(scheduled) -> Any:
            for name in scheduled.finished_req_ids:
                self._keep(name)
            return update_states(scheduled)

        runner._update_states = keep_finished
        bind_routed_experts_capturer(runner.get_model(), self)

    def capture(self, layer_id: int, topk_ids: torch.Tensor) -> None:
        """Called by each router in each forward pass with its ``[tokens, top_k]`` choices."""
        slots = get_forward_context().slot_mapping[self._layer].numpy()
        real = slots >= 0
        self._rows[slots[real], layer_id] = topk_ids.numpy()[real]

    def take(self, request_id: str, count: int) -> np.ndarray | None:
        """``[count, layers, top_k]`` of a request's first tokens, zeros in layers without experts; ``None``: it is unknown.

        A request is asked for once, after it finished. Its rows are kept until then.
        """
        name = self._inner_name(request_id, self._finished) or self._inner_name(request_id, self._runner.requests)
        if name is None:
            return None
        if name not in self._finished:
            self._keep(name)
        rows = self._finished.pop(name)
        return rows[:count] if len(rows) >= count else None

    @staticmethod
    def _inner_name(request_id: str, names: Iterable[str]) -> str | None:
        """vLLM's name of a request: the given one and a random suffix."""
        return next((name for name in names if name.rpartition("-")[0] == request_id), None)

    def _keep(self, name: str) -> None:
        """Copy a request's rows before its slots are given to others."""
        if name not in self._runner.requests:
            return
        blocks = np.array(self._runner.requests[name].block_ids[0], dtype=np.int64)
        slots = (blocks[:, None] * self._block_size + np.arange(self._block_size)).reshape(-1)
        self._finished[name] = self._rows[slots]
        while len(self._finished) > _MOST_KEPT:  # of clients that went away
            self._finished.popitem(last=False)
