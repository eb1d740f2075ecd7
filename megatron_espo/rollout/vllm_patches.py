"""Changes to vLLM at run time, for vLLM 0.32. Imports vLLM's modules on first use.

``tests/test_vllm_patches.py`` checks that the installed vLLM still needs each patch.
"""

import os
from typing import Any

import torch

from megatron_espo.rewards import sandbox


def start_reload(model: torch.nn.Module) -> None:
    """Start vLLM's reload of all weights. On a CPU, remove the kernels of expert layers before.

    vLLM 0.32. On a CPU vLLM packs the weights of experts only when it builds the kernel. In a
    reload the existing kernel would use the new weights as if they were packed.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        for layer in model.modules():
            method = getattr(layer, "quant_method", None)
            if isinstance(method, UnquantizedFusedMoEMethod):
                method.moe_kernel = None
    initialize_layerwise_reload(model)


def finish_reload(model: torch.nn.Module, model_config: Any) -> None:
    """Finish vLLM's reload, and pack the weight of a tied output layer again.

    vLLM 0.32. A tied output layer shares the embedding's weight, and on a CPU computes with a
    packed copy. vLLM's reload packs only layers that received tensors, so the copy would be old.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(model, model_config)
    if model_config.hf_text_config.tie_word_embeddings:
        for layer in model.modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)


def clone_pending_weights(model: torch.nn.Module, buffer: torch.Tensor) -> None:
    """Clone the tensors in ``buffer`` that vLLM keeps until their layer is complete.

    vLLM 0.32. In a reload vLLM stores the arguments of its weight loaders, and the sender may
    overwrite ``buffer`` (uint8) before the layer is complete.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    start, size = buffer.data_ptr(), buffer.numel()
    for layer in model.modules():
        for _, bound in get_layerwise_info(layer).loaded_weights:
            for name, value in bound.arguments.items():
                if isinstance(value, torch.Tensor) and 0 <= value.data_ptr() - start < size:
                    bound.arguments[name] = value.clone()


def record_routed_experts(runner: Any, record: Any) -> None:
    """Send the routers' choices to ``record``; report requests before vLLM drops their state.

    vLLM 0.32. ``enable_return_routed_experts`` works only with vLLM's second model runner, which
    needs Triton. CPU builds have no Triton.

    Args:
        runner: vLLM's first model runner.
        record: its ``capture(layer_id, topk_ids)`` is called in every forward pass, and its
            ``keep(name)`` with the internal name of each finished request.
    """
    from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
        bind_routed_experts_capturer,
    )

    update_states = runner._update_states

    def report_and_update(scheduled: Any) -> Any:
        for name in scheduled.finished_req_ids:
            record.keep(name)
        return update_states(scheduled)

    runner._update_states = report_and_update
    bind_routed_experts_capturer(runner.get_model(), record)


def allow_sampling_masks() -> None:
    """Accept ``return_sampling_mask`` on a CPU, where :func:`record_sampling_masks` provides it.

    vLLM 0.32. vLLM refuses the option without its second model runner, which needs Triton.
    """
    from vllm.config import VllmConfig

    VllmConfig._verify_sampling_replay_config = lambda self: None  # type: ignore[method-assign]


def record_sampling_masks(runner: Any) -> None:
    """Add the ids that top-k and top-p kept to every output of ``runner``.

    vLLM 0.32. Only vLLM's second model runner adds them. The scheduler, which sends them on,
    serves both.

    Args:
        runner: vLLM's first model runner, with ``logprobs_mode`` ``processed_logprobs``.
    """
    from vllm.v1.outputs import SamplingMaskLists

    sampler, sample_tokens = runner.sampler.topk_topp_sampler, runner.sample_tokens
    sample = sampler.forward
    masks: list[SamplingMaskLists] = []

    def sample_and_record(*args: Any) -> Any:
        sampled, logprobs = sample(*args)
        rows, ids = (logprobs > -torch.inf).nonzero(as_tuple=True)
        offsets = torch.searchsorted(rows, torch.arange(len(logprobs) + 1))
        masks[:] = [SamplingMaskLists(ids.int().numpy(), offsets.numpy())]
        return sampled, logprobs

    def sample_and_add(grammar: Any) -> Any:
        output = sample_tokens(grammar)
        if masks:
            output.sampling_masks = masks.pop()
        return output

    sampler.forward, runner.sample_tokens = sample_and_record, sample_and_add


def fork_engine() -> None:
    """Fork the engine from the API server on a CPU, so that it does not import vLLM again.

    vLLM 0.32. Its CPU platform always starts a new interpreter.
    """
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def check_and_fork(vllm_config: Any) -> None:
        check(vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = staticmethod(check_and_fork)  # type: ignore
    os.register_at_fork(after_in_child=sandbox.die_with_parent)
