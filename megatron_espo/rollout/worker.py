"""What vLLM's workers get from this project (``worker_extension_cls``): our transports and the checks."""

from typing import Any

import torch
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

from megatron_espo.rollout.read_back import read_back_checksums
from megatron_espo.rollout.routed_experts import RoutedExpertsRecord
from megatron_espo.rollout.transport import register_transports
from megatron_espo.rollout.vllm_patches import forget_expert_kernels, repack_tied_head

register_transports()


class WorkerExtension:
    """Mixed into vLLM's worker class. ``collective_rpc`` finds its methods by name; arguments and results are JSON values."""

    def ping(self) -> bool:
        """Answer, which shows that this worker runs."""
        return True

    def fill_nan(self, shapes: list[tuple[str, list[int]]]) -> None:
        """Load NaN into every named weight, by the way that real weights arrive."""
        model = self.model_runner.get_model()
        nan = torch.tensor(torch.nan, dtype=self.model_config.dtype, device=self.device)
        if self.device.type == "cpu":
            forget_expert_kernels(model)
        initialize_layerwise_reload(model)
        model.load_weights((name, nan.expand(shape)) for name, shape in shapes)
        finalize_layerwise_reload(model, self.model_config)
        repack_tied_head(model, self.model_config)

    def read_back_checksums(self, dtype: str) -> dict[str, int]:
        """See ``read_back.read_back_checksums``."""
        return read_back_checksums(self.model_runner.get_model(), getattr(torch, dtype))

    def record_routed_experts(self) -> None:
        """Keep from now on the experts that each token is sent to."""
        if self.rank == 0:  # the routers of all tensor-parallel workers choose for all tokens
            self._routed_experts = RoutedExpertsRecord(self.model_runner)

    def take_routed_experts(self, request_id: str, count: int) -> dict[str, Any] | None:
        """``[count, layers, top_k]`` experts of a finished request's first tokens, as dtype, shape and bytes; once. From the first worker."""
        rows = self._routed_experts.take(request_id, count) if self.rank == 0 else None
        return None if rows is None else {"dtype": rows.dtype.str, "shape": list(rows.shape), "data": rows.tobytes()}

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
