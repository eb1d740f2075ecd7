"""What vLLM's workers get from this project (``worker_extension_cls``): our transports and the checks."""

import numpy as np
import torch
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

from megatron_espo.rollout.reloading import forget_expert_kernels, repack_tied_head
from megatron_espo.rollout.routed_experts import RoutedExpertsRecord
from megatron_espo.rollout.served import served_checksums
from megatron_espo.rollout.transport import register_transports

register_transports()


class WorkerExtension:
    """Mixed into vLLM's worker class; ``LLM.collective_rpc`` finds its methods by name."""

    def poison_weights(self, shapes: list[tuple[str, tuple[int, ...]]]) -> None:
        """Load NaN into every named weight, by the way that real ones come."""
        model = self.model_runner.get_model()
        nan = torch.tensor(torch.nan, dtype=self.model_config.dtype, device=self.device)
        if self.device.type == "cpu":
            forget_expert_kernels(model)
        initialize_layerwise_reload(model)
        model.load_weights((name, nan.expand(shape)) for name, shape in shapes)
        finalize_layerwise_reload(model, self.model_config)
        repack_tied_head(model, self.model_config)

    def served_checksums(self, dtype: str) -> dict[str, int]:
        """See ``served.served_checksums``."""
        return served_checksums(self.model_runner.get_model(), getattr(torch, dtype))

    def record_routed_experts(self) -> None:
        """Keep from now on what ``routed_experts`` tells."""
        if self.rank == 0:  # routers of tensor-parallel workers all choose for all tokens
            self._routed_experts = RoutedExpertsRecord(self.model_runner)

    def routed_experts(self, requests: list[tuple[str, int]]) -> list[np.ndarray | None] | None:
        """See ``RoutedExpertsRecord.read``, for each (request, tokens); from the first worker."""
        return [self._routed_experts.read(*request) for request in requests] if self.rank == 0 else None

    def transfer_seconds(self) -> dict[str, float]:
        """Where this worker spent the last weight update, as far as its transport measures it."""
        return dict(getattr(self.weight_transfer_engine, "seconds", {}))

    def missing_weights(self) -> list[str]:
        """What a running weight update lacks: tensors where the transport knows, else layers with too few elements.

        vLLM counts the elements that reached each layer, but finishes an update whatever the count is.
        """
        if found := getattr(self.weight_transfer_engine, "missing_weights", list)():
            return found
        for name, layer in self.model_runner.get_model().named_modules():
            info = get_layerwise_info(layer)
            if not info.can_load() or is_deferred_attention_layer(layer):
                continue  # complete, or an attention layer, whose scales are optional
            expected = self._expected_elements(layer)
            if info.load_numel < expected:
                found.append(f"{name}: {info.load_numel} of {expected} elements")
        return found

    def _expected_elements(self, layer) -> int:
        if isinstance(layer, VocabParallelEmbedding):
            if isinstance(layer, ParallelLMHead) and self.model_config.hf_text_config.tie_word_embeddings:
                return 0
            # The vocabulary is padded in memory, not in the stream.
            return layer.shard_indices.num_org_elements * layer.embedding_dim
        return sum(get_tensor_load_numel(p) for p in layer._parameters.values() if p is not None)
