"""On a GPU: memory that trainer or engine gives away is free. Has never run."""

import subprocess
import sys

import pytest
import torch

from tests.distributed import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def test_what_leaves_frees_gpu_memory(tmp_path):
    """A hundred million parameters in bfloat16: 18 bytes each."""
    from tests.weights_models import save_model

    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
    save_model("qwen3", tmp_path, **sizes, num_hidden_layers=6, vocab_size=8192)
    code = f"from tests.ranks.offload import check_gpu_memory; check_gpu_memory({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_sleeping_engine_frees_gpu_memory(tmp_path):
    pytest.importorskip("vllm")
    from megatron_espo.rollout import Engine, push_weights
    from tests.test_rollout import assert_serves, connect, engine_config, make_llama

    def free() -> int:
        return torch.cuda.mem_get_info()[0]

    model, share = make_llama(tmp_path).cuda(), 0.3
    total = torch.cuda.mem_get_info()[1]
    config = engine_config(tmp_path, tmp_path / "engine.log", transport="ipc", sleep=True, gpu_memory_utilization=share, start_timeout_s=600)
    with Engine(config, decode=str) as engine:
        before = free()
        engine.start().wait_ready()
        awake = free()
        engine.sleep()
        asleep = free()
        assert before - awake > 0.8 * share * total
        # What stays: CUDA context, NCCL's buffers, CUDA graphs.
        assert asleep - awake > 0.8 * (before - awake)
        engine.wake([(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items() if name != "lm_head.weight"])
        assert asleep - free() < 0.1 * share * total, "a tiny model's weights, without caches"
        push_weights(connect(engine, model), engine, 1)
        assert_serves(engine, model.cpu())
        assert free() - awake < 0.1 * share * total, "the caches are back"
