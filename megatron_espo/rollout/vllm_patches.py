"""What vLLM's reload of weights leaves out on a CPU. Its own modules are imported on first use."""

import torch


def forget_expert_kernels(model: torch.nn.Module) -> None:
    """Have vLLM build the kernels of experts again when it has loaded their weights; call it before.

    On a CPU a layer of experts computes with padded and packed weights, and vLLM packs them only where it builds the
    kernel, not where it reloads: the kernel would take the new weights for packed ones.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    for layer in model.modules():
        if isinstance(method := getattr(layer, "quant_method", None), UnquantizedFusedMoEMethod):
            method.moe_kernel = None


def repack_tied_head(model: torch.nn.Module, model_config) -> None:
    """Renew the packed copy that a tied output layer computes with on a CPU.

    It shares the embedding's weight, but vLLM's layerwise reload repacks only the layers that received tensors: logits
    would come from old weights.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    if model_config.hf_text_config.tie_word_embeddings:
        for layer in model.modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)
