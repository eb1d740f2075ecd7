"""This project's methods of vLLM's workers (``worker_extension_cls``)."""

from typing import Any

import torch
from vllm.model_executor.layers import vocab_parallel_embedding as vocab
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

from megatron_espo.rollout.read_back import read_back_checksums
from megatron_espo.rollout.routed_experts import RoutedExpertsRecord
from megatron_espo.rollout.transport import register_transports
from megatron_espo.rollout.vllm_patches import forget_expert_kernels, repack_tied_head

register_transports()


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
        if self.device.type == "cpu":
            forget_expert_kernels(model)
        layerwise.initialize_layerwise_reload(model)
        model.load_weights((name, nan.expand(shape)) for name, shape in shapes)
        layerwise.finalize_layerwise_reload(model, self.model_config)
        repack_tied_head(model, self.model_config)

    def read_back_checksums(self, dtype: str) -> dict[str, int]:
        """See ``read_back.read_back_checksums``."""
        return read_back_checksums(self.model_runner.get_model(), getattr(torch, dtype))

    def record_routed_experts(self) -> None:
        """Start recording the experts of each token."""
        if self.rank == 0:  # the routers of all tensor-parallel workers make the same choices
            self._routed_experts = RoutedExpertsRecord(self.model_runner)

    def take_routed_experts(self, request_id: str, count: int) -> dict[str, Any] | None:
        """See ``RoutedExpertsRecord.take``; as dtype, shape and bytes, from the first worker."""
        rows = self._routed_experts.take(request_id, count) if self.rank == 0 else None
        if rows is None:
            return None
        return {"dtype": rows.dtype.str, "shape": list(rows.shape), "data": rows.tobytes()}

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
