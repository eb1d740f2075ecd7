"""The installed vLLM needs every patch in ``vllm_patches``. If a test fails, delete its patch."""

import inspect
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform
from vllm.triton_utils import HAS_TRITON


class Packing(QuantizeMethodBase):
    """Records the layers whose weights vLLM packs."""

    create_weights = apply = None

    def __init__(self) -> None:
        self.packed = []

    def process_weights_after_loading(self, layer) -> None:
        self.packed.append(layer)


def reloading_layer() -> torch.nn.Module:
    """A layer with a weight and a bias at the start of a reload."""
    layer = torch.nn.Linear(2, 2)
    layer.quant_method = Packing()
    record_metadata_for_reloading(layer)
    initialize_layerwise_reload(layer)
    return layer


def test_start_reload_is_needed():
    """vLLM does not pack the weights of an expert layer that has a kernel."""
    packed = []
    method = object.__new__(UnquantizedFusedMoEMethod)
    experts = SimpleNamespace(process_weights_after_loading=packed.append)
    method.moe_kernel = SimpleNamespace(fused_experts=experts)
    method.unquantized_backend = UnquantizedMoeBackend.CPU
    layer, weight = torch.nn.Module(), torch.zeros(2, 4, 4)
    layer.moe_config = None
    layer.w13_weight, layer.w2_weight = (torch.nn.Parameter(weight, False) for _ in range(2))
    method._setup_kernel(layer, layer.w13_weight, layer.w2_weight)
    assert not packed


def test_finish_reload_is_needed():
    """vLLM does not pack the weight of a layer that received no tensors."""
    layer = reloading_layer()
    finalize_layerwise_reload(layer, None)
    assert not layer.quant_method.packed


def test_clone_pending_weights_is_needed():
    """vLLM keeps the received tensor itself until its layer is complete."""
    layer, tensor = reloading_layer(), torch.ones(2, 2)
    layer.weight.weight_loader(layer.weight, tensor)
    ((_, bound),) = get_layerwise_info(layer).loaded_weights
    assert any(value is tensor for value in bound.arguments.values())


@pytest.mark.skipif(not current_platform.is_cpu(), reason="for CPU builds of vLLM")
def test_record_routed_experts_is_needed():
    """vLLM's second model runner, which records experts, needs Triton."""
    assert not HAS_TRITON


@pytest.mark.skipif(not current_platform.is_cpu(), reason="for CPU builds of vLLM")
def test_sampling_masks_are_needed():
    """vLLM refuses ``return_sampling_mask`` with its first model runner."""
    model = SimpleNamespace(return_sampling_mask=True)
    config = SimpleNamespace(model_config=model, use_v2_model_runner=False)
    with pytest.raises(ValueError, match="requires Model Runner V2"):
        VllmConfig._verify_sampling_replay_config(config)


def test_fork_engine_is_needed():
    """vLLM's CPU platform leaves no choice of the start method."""
    setting = 'os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"'
    assert setting in inspect.getsource(CpuPlatform.check_and_update_config)
