"""This project's methods of vLLM's workers (``worker_extension_cls``)."""

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers import vocab_parallel_embedding as vocab
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

from megatron_espo.rollout import vllm_patches
from megatron_espo.rollout.read_back import read_back_checksums, read_back_sketches

_MAX_FINISHED = 4096  # of requests whose experts nobody took


class WorkerExtension:
    """Mixed into vLLM's worker class. ``collective_rpc`` calls its methods with JSON values."""

    device: torch.device
    model_config: Any
    model_runner: Any
    rank: int
    weight_transfer_engine: Any

    def ping(self) -> bool:
        """Return True, which shows that this worker runs."""
        return True

    def fill_nan(self, shapes: list[tuple[str, list[int]]]) -> None:
        """Load NaN into every named weight in the way that an update loads weights."""
        model = self.model_runner.get_model()
        nan = torch.tensor(torch.nan, dtype=self.model_config.dtype, device=self.device)
        vllm_patches.start_reload(model)
        model.load_weights((name, nan.expand(shape)) for name, shape in shapes)
        vllm_patches.finish_reload(model, self.model_config)

    def read_back_checksums(self, dtype: str) -> dict[str, int]:
        """See ``read_back.read_back_checksums``."""
        return read_back_checksums(self.model_runner.get_model(), getattr(torch, dtype))

    def read_back_sketches(self) -> list[tuple[str, str, bool, list[float]]]:
        """See ``read_back.read_back_sketches``."""
        model = self.model_runner.get_model()
        return read_back_sketches(model, self.model_config.dtype, self.device)

    def start_records(self, routed_experts: bool, sampling_masks: bool) -> None:
        """Start recording the experts of each token, and the ids that top-k and top-p kept."""
        if routed_experts and self.rank == 0:  # the other workers' routers make the same choices
            self._routed_experts = RoutedExpertsRecord(self.model_runner)
        if sampling_masks:
            vllm_patches.record_sampling_masks(self.model_runner)

    def take_routed_experts(self, request_id: str) -> bytes | None:
        """See ``RoutedExpertsRecord.take``; in safetensors format, from the first worker."""
        if self.rank > 0:
            return None
        return save({"experts": self._routed_experts.take(request_id)})

    def missing_weights(self) -> list[str]:
        """What the current update lacks: tensors if the transport knows them, else layers.

        vLLM counts the elements that reached each layer, but ignores the count when it finishes an
        update.
        """
        found: list[str] = getattr(self.weight_transfer_engine, "missing_weights", list)()
        if found:
            return found
        for name, layer in self.model_runner.get_model().named_modules():
            info = layerwise.get_layerwise_info(layer)
            # Layers that cannot load are complete. The scales of attention layers are optional.
            if info.can_load() and not is_deferred_attention_layer(layer):
                expected = self._expected_elements(layer)
                if info.load_numel < expected:
                    found.append(f"{name}: {info.load_numel} of {expected} elements")
        return found

    def _expected_elements(self, layer: torch.nn.Module) -> int:
        if isinstance(layer, vocab.VocabParallelEmbedding):
            tied = self.model_config.hf_text_config.tie_word_embeddings
            if tied and isinstance(layer, vocab.ParallelLMHead):
                return 0
            # vLLM pads the vocabulary in memory; the stream is not padded.
            return layer.shard_indices.num_org_elements * layer.embedding_dim
        return sum(get_tensor_load_numel(p) for p in layer._parameters.values() if p is not None)


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
        vllm_patches.record_routed_experts(runner, self)

    def capture(self, layer_id: int, topk_ids: torch.Tensor) -> None:
        """Store a router's ``[tokens, top_k]`` choices. Called in every forward pass."""
        slots = get_forward_context().slot_mapping[self._layer].numpy()
        used = slots >= 0
        self._rows[slots[used], layer_id] = topk_ids.numpy()[used]

    def take(self, request_id: str) -> np.ndarray:
        """``[tokens, layers, top_k]`` experts of a request, and of the unused rest of its blocks.

        Zeros in dense layers; no tokens if the request is unknown. Removes the request.
        """
        # vLLM's internal name is the request id and a random suffix.
        names = [*self._finished, *self._runner.requests]
        name = next((name for name in names if name.rpartition("-")[0] == request_id), "")
        self.keep(name)
        return self._finished.pop(name, self._rows[:0])

    def keep(self, name: str) -> None:
        """Copy a running request's rows before vLLM reuses its slots."""
        if name not in self._runner.requests:
            return
        blocks = np.array(self._runner.requests[name].block_ids[0], dtype=np.int64)
        slots = (blocks[:, None] * self._block_size + np.arange(self._block_size)).reshape(-1)
        self._finished[name] = self._rows[slots]
        while len(self._finished) > _MAX_FINISHED:  # clients that disconnected never take theirs
            self._finished.popitem(last=False)
