"""Which experts the engine sent each token to, where vLLM itself does not tell: a record kept by key-value slot, in a worker process.

vLLM returns them (``enable_return_routed_experts``) from its second model runner, which needs Triton. A CPU build without Triton has the first
one; its routers call the same hook, so the choices recorded here are those that the engine computed with.
"""

import numpy as np
import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import bind_routed_experts_capturer


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
        bind_routed_experts_capturer(runner.get_model(), self)

    def capture(self, layer_id: int, topk_ids: torch.Tensor) -> None:
        """Called by each router in each forward pass with its ``[tokens, top_k]`` choices."""
        slots = get_forward_context().slot_mapping[self._layer].numpy()
        real = slots >= 0
        self._rows[slots[real], layer_id] = topk_ids.numpy()[real]

    def read(self, request_id: str, count: int) -> np.ndarray | None:
        """``[count, layers, top_k]`` of a request's first tokens, zeros in layers without experts; ``None`` unless it was part of the latest step.

        The next step gives the slots of a finished request away, and one that was preempted has none.
        """
        if request_id not in self._runner.input_batch.req_id_to_index:
            return None
        blocks = np.array(self._runner.requests[request_id].block_ids[0])
        slots = (blocks[:, None] * self._block_size + np.arange(self._block_size)).reshape(-1)
        return self._rows[slots[:count]]
