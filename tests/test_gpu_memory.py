"""Offloading and sleeping free memory on a GPU. Has never passed: on one H100 the first test did
not end within its limit of a minute.
"""

import subprocess
import sys

import pytest
import torch

from tests.support.distributed import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_offloading_frees_gpu_memory(tmp_path):
    """A hundred million parameters in bfloat16: 18 bytes each."""
    from tests.support.weights_models import save_model

    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
    }
    save_model("qwen3", tmp_path, **sizes, num_hidden_layers=6, vocab_size=8192)
    module = "tests.support.ranks.offload"
    code = f"from {module} import check_gpu_memory; check_gpu_memory({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_sleeping_engine_frees_gpu_memory(tmp_path):
    pytest.importorskip("vllm")
    from transformers import LlamaForCausalLM
    from vllm.distributed.weight_transfer.base import ModuleSource

    from megatron_espo.rollout.transport import make_trainer_transport, send_weights
    from tests.support.real_engine import assert_serves, engine_config, running_engine
    from tests.support.tiny import save_tiny_model

    def free() -> int:
        return torch.cuda.mem_get_info()[0]

    folder, share = save_tiny_model(tmp_path / "model"), 0.3
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda()
    before, total = torch.cuda.mem_get_info()
    config = engine_config(
        folder,
        tmp_path,
        transport="ipc",
        sleep=True,
        gpu_memory_utilization=share,
        timeout_s=600,
        engine_args={},
    )
    with running_engine(config) as engine:
        awake = free()
        engine.sleep()
        asleep = free()
        assert before - awake > 0.8 * share * total
        # The CUDA context, NCCL's buffers and CUDA graphs stay.
        assert asleep - awake > 0.8 * (before - awake)
        engine.wake(
            [
                (name, tuple(tensor.shape))
                for name, tensor in model.state_dict().items()
                if name != "lm_head.weight"
            ]
        )
        assert asleep - free() < 0.1 * share * total, "only the weights are back"
        send_weights(
            make_trainer_transport("ipc", engine=engine, source=ModuleSource(model), rank=0),
            engine,
            1,
        )
        engine.wake_caches()
        engine.resume()
        engine.serve()
        assert_serves(engine, model.cpu(), [(5, 6, 7, 8)])
        assert free() - awake < 0.1 * share * total, "the caches are back"
