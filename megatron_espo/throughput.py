"""How fast a step was and what the machine had to give: tokens a second, model FLOPs utilisation, memory."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

GIB = 2**30
# Dense bfloat16 FLOP/s from the vendors' data sheets; the first name found in the device's counts.
PEAK_BFLOAT16 = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "B200": 2250e12,
}


def matmul_parameters(hf_config: dict[str, Any]) -> int:
    """Weights that one token is multiplied with: attention, feed-forward (the chosen experts' only) and output layer."""
    hidden, heads = hf_config["hidden_size"], hf_config["num_attention_heads"]
    head_dim = hf_config.get("head_dim") or hidden // heads
    kv_heads = hf_config.get("num_key_value_heads") or heads
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    layers, step = hf_config["num_hidden_layers"], hf_config.get("decoder_sparse_step") or 1
    dense = hf_config.get("mlp_only_layers") or []
    feed_forward = 0
    for layer in range(layers):
        if hf_config.get("num_experts") and layer not in dense and (layer + 1) % step == 0:
            experts = hf_config["num_experts_per_tok"] * 3 * hidden * hf_config["moe_intermediate_size"]
            feed_forward += experts + hidden * hf_config["num_experts"]
        else:
            feed_forward += 3 * hidden * hf_config["intermediate_size"]
    return layers * attention + feed_forward + hidden * hf_config["vocab_size"]


def training_flops(hf_config: dict[str, Any], lengths: Sequence[int]) -> float:
    """FLOPs of forward and backward over sequences of ``lengths`` tokens with causal attention; nothing is counted twice (no recomputation)."""
    heads = hf_config["num_attention_heads"]
    width = heads * (hf_config.get("head_dim") or hf_config["hidden_size"] // heads)
    # Two products (scores, values) of 2 x width FLOPs for each of T^2 / 2 pairs; backward is twice the forward.
    attention = 6 * hf_config["num_hidden_layers"] * width
    return 6.0 * matmul_parameters(hf_config) * sum(lengths) + attention * sum(length**2 for length in lengths)


def peak_flops(dtype: str) -> float | None:
    """FLOP/s of one of this machine's GPUs; ``None`` on a CPU, for an unknown GPU, and for anything but bfloat16."""
    if dtype != "bfloat16" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for known, peak in PEAK_BFLOAT16.items() if known in name), None)


def system_metrics() -> dict[str, float]:
    """Memory of this process, of its machine and of its GPU (all that is taken there, the engine's too), in GiB. Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    host = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in open("/proc/meminfo"))}
    found = {
        "system/rss_gib": pages * os.sysconf("SC_PAGE_SIZE") / GIB,
        "system/host_memory_gib": (host["MemTotal"] - host["MemAvailable"]) * 1024 / GIB,
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found["system/gpu_memory_gib"] = (total - free) / GIB
        found["system/gpu_peak_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
    return found
