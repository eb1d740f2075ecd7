"""How fast a step was and what the machine had to give: tokens a second, model FLOPs utilisation, memory."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_espo.config.experts import read_experts
from megatron_espo.weights.families import model_sizes

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
    size, experts = model_sizes(hf_config), read_experts(hf_config)
    layers = hf_config["num_hidden_layers"]
    sparse = sum(experts.layers) if experts else 0
    attention = 2 * size["hidden"] * (size["query"] + size["key"])
    feed_forward = (layers - sparse) * 3 * size["ffn"]
    if experts:
        feed_forward += sparse * (experts.per_token * 3 * experts.ffn + experts.count)  # the router too
    return layers * attention + size["hidden"] * (feed_forward + size["vocab"])


def training_flops(hf_config: dict[str, Any], lengths: Sequence[int]) -> float:
    """FLOPs of forward and backward over sequences of ``lengths`` tokens with causal attention; nothing is counted twice (no recomputation)."""
    # Two products (scores, values) of 2 x query width FLOPs for each of T^2 / 2 pairs; backward is twice the forward.
    attention = 6 * hf_config["num_hidden_layers"] * model_sizes(hf_config)["query"]
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
