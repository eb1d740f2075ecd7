"""Read-back of vLLM's fused layers: the parts of all ranks are the tensors of the checkpoint."""

import pytest
import torch
from vllm.model_executor.layers import linear

from megatron_espo.distributed.checksum import tensor_checksum
from megatron_espo.rollout import read_back

HEAD, COLUMNS = 4, 6


def make_layer(kind: type, rank: int, ranks: int, parts: list[torch.Tensor], copies: int = 1):
    """The attributes of a rank's layer that the read-back uses; vLLM's constructor needs groups."""
    layer = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    layer.tp_rank, layer.tp_size, layer.input_size = rank, ranks, COLUMNS
    layer.num_kv_head_replicas = copies
    counts = [ranks] + [ranks // copies] * (len(parts) - 1)
    indices = [rank] + [rank // copies] * (len(parts) - 1)
    own = [part.chunk(n)[i] for part, n, i in zip(parts, counts, indices, strict=True)]
    layer.output_partition_sizes = [len(part) for part in own]
    layer.weight = torch.nn.Parameter(torch.cat(own))
    return layer


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("is_fused", [False, True])
def test_parts_of_all_ranks_are_the_tensors(monkeypatch, ranks, is_fused):
    """With four ranks two of them hold copies of each key-value head."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(heads * HEAD, COLUMNS) for heads in (8, 2, 2))
    gate, up = torch.randn(2, 16, COLUMNS)
    found: dict[str, int] = {}
    for rank in range(ranks):
        monkeypatch.setattr(read_back, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        copies = max(1, ranks // 2)
        model = torch.nn.Module()
        model.qkv_proj = make_layer(linear.QKVParallelLinear, rank, ranks, [q, k, v], copies)
        model.gate_up_proj = make_layer(linear.MergedColumnParallelLinear, rank, ranks, [gate, up])
        model.packed_modules_mapping = {"qkv_proj": ["q", "k", "v"], "gate_up_proj": ["gate", "up"]}
        if is_fused:  # as in vLLM's Phi-3
            model.packed_modules_mapping = {name: [name] for name in model.packed_modules_mapping}
        for name, part in read_back.read_back_checksums(model, torch.float32).items():
            found[name.strip(".")] = (found.get(name.strip("."), 0) + part) % 2**64
    whole = {"qkv_proj": torch.cat([q, k, v]), "gate_up_proj": torch.cat([gate, up])}
    parts = {"q": q, "k": k, "v": v, "gate": gate, "up": up, "gate_up_proj": whole["gate_up_proj"]}
    expected = whole if is_fused else parts
    assert found == {f"{name}.weight": tensor_checksum(x) for name, x in expected.items()}
