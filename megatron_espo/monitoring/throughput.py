"""FLOPs of training, peak FLOP/s of GPUs, and memory in use."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_espo.models.experts import read_experts
from megatron_espo.models.families import model_sizes

GIB = 2**30
# Dense bfloat16 FLOP/s from the vendors' data sheets. The first name that is part of the device's
# name counts.
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
    """Number of weights in a token's matrix products: attention, feed-forward (chosen experts only)
    and output layer.
    """
    size, experts = model_sizes(hf_config), read_experts(hf_config)
    layers = hf_config["num_hidden_layers"]
    sparse = sum(experts.layers) if experts else 0
    attention = 2 * size["hidden"] * (size["query"] + size["key"])
    feed_forward = (layers - sparse) * 3 * size["ffn"]
    if experts:
        router = experts.count
        feed_forward += sparse * (experts.per_token * 3 * experts.ffn + router)
    return layers * attention + size["hidden"] * (feed_forward + size["vocab"])


def training_flops(hf_config: dict[str, Any], lengths: Sequence[int]) -> float:
    """FLOPs of forward and backward over sequences of ``lengths`` tokens with causal attention,
    without recomputation.
    """
    # Two products (scores, values) of 2 x query width FLOPs for each of T^2 / 2 pairs. Backward is
    # twice the forward.
    attention = 6 * hf_config["num_hidden_layers"] * model_sizes(hf_config)["query"]
    pairs = sum(length**2 for length in lengths)
    return 6.0 * matmul_parameters(hf_config) * sum(lengths) + attention * pairs


def peak_flops(dtype: str) -> float | None:
    """Peak FLOP/s of this GPU; ``None`` on a CPU, for an unknown GPU, and for dtypes other than
    bfloat16.
    """
    if dtype != "bfloat16" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for known, peak in PEAK_BFLOAT16.items() if known in name), None)


def system_metrics() -> dict[str, float]:
    """Memory in use in GiB: by this process, on the machine, and on the GPU (by all processes).

    Linux.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    lines = Path("/proc/meminfo").read_text().splitlines()
    host = {line.split()[0]: int(line.split()[1]) for line in lines}
    found = {
        "system/rss_gib": pages * os.sysconf("SC_PAGE_SIZE") / GIB,
        "system/host_memory_gib": (host["MemTotal:"] - host["MemAvailable:"]) * 1024 / GIB,
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found["system/gpu_memory_gib"] = (total - free) / GIB
        found["system/gpu_peak_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
    return found
