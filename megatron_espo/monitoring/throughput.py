"""FLOPs of training, peak FLOP/s of GPUs, memory in use, and the performance of a whole run."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import psutil  # accelerate requires it
import torch

from megatron_espo.models.spec import ModelSpec

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

_PHASES = ("rollout", "reward", "score", "train", "sync", "checkpoint")
PARTS = {"verify", "canary"}  # phases inside another one


def matmul_parameters(spec: ModelSpec) -> int:
    """Number of weights in a token's matrix products: attention, feed-forward (chosen experts only)
    and output layer.
    """
    found = [0, 0]  # outside of the routed experts, in all of them
    for mapping in (mapping for group in spec.groups[1:-1] for mapping in group):
        matrices = (prod(shape) for _, shape in mapping.huggingface if len(shape) == 2)
        found[mapping.expert is not None] += sum(matrices)
    experts = spec.experts
    chosen = found[1] * experts.per_token // experts.count if experts else 0
    return found[0] + chosen + spec.hidden_size * spec.vocab_size


def training_flops(spec: ModelSpec, lengths: Sequence[int]) -> float:
    """FLOPs of forward and backward over sequences of ``lengths`` tokens with causal attention,
    without recomputation.
    """
    # Two products (scores, values) of 2 x their width FLOPs for each of T^2 / 2 pairs. Backward is
    # twice the forward.
    attention = 3 * spec.num_hidden_layers * (spec.sizes["query"] + spec.sizes["value"])
    pairs = sum(length**2 for length in lengths)
    return 6.0 * matmul_parameters(spec) * sum(lengths) + attention * pairs


def peak_flops(dtype: str) -> float | None:
    """Peak FLOP/s of this GPU; ``None`` on a CPU, for an unknown GPU, and for dtypes other than
    bfloat16.
    """
    if dtype != "bfloat16" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for known, peak in PEAK_BFLOAT16.items() if known in name), None)


def system_metrics() -> dict[str, float]:
    """Memory in use in GiB: by this process, on the machine, and on the GPU (by all processes)."""
    host = psutil.virtual_memory()
    found = {
        "system/rss_gib": psutil.Process().memory_info().rss / GIB,
        "system/host_memory_gib": (host.total - host.available) / GIB,
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found["system/gpu_memory_gib"] = (total - free) / GIB
        found["system/gpu_peak_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
    return found


def performance(lines: Sequence[Mapping[str, Any]], checkpoint_s: float = 0.0) -> dict[str, Any]:
    """Mean seconds of a run's steps by phase, tokens per second and GPU, and MFU.

    Args:
        lines: ``metrics.jsonl``.
        checkpoint_s: seconds of a checkpoint after the last line; a checkpoint counts in the
            next line.

    Returns:
        ``step_s``; ``phases``: seconds and share of the step by name; ``tokens_per_s_per_gpu``:
        ``generated`` and ``trained`` tokens per second of the step; ``mfu`` of the train phase.
        ``None`` for what the run did not measure (MFU on a CPU).
    """
    seconds = defaultdict(float, dict.fromkeys(_PHASES, 0.0))
    for line in [*lines, {"time/checkpoint_s": checkpoint_s}]:
        for key, value in line.items():
            if key.startswith("time/") and key[5:-2] not in PARTS:
                seconds[key[5:-2]] += value
    whole = seconds.pop("step", 0.0) + seconds["checkpoint"]
    seconds["train"] -= seconds["score"]
    seconds["other"] = max(0.0, whole - sum(seconds.values()))
    phases = {
        "weight update" if name == "sync" else name: {
            "seconds": value / len(lines),
            "share": value / whole if whole else 0.0,
        }
        for name, value in seconds.items()
    }

    def mean(metric: str, phase: str) -> float | None:
        """Over the seconds of a phase."""
        found = [line for line in lines if metric in line and phase in line]
        weight = sum(line[phase] for line in found)
        return sum(line[metric] * line[phase] for line in found) / weight if weight else None

    return {
        "step_s": whole / len(lines),
        "phases": phases,
        "tokens_per_s_per_gpu": {
            kind: mean(f"throughput/{kind}_tokens_per_s_per_gpu", "time/step_s")
            for kind in ("generated", "trained")
        },
        "mfu": mean("throughput/mfu", "time/train_s"),
    }


def describe(found: Mapping[str, Any]) -> list[str]:
    """Lines of text about :func:`performance`."""
    phases = (
        f"{name} {phase['seconds']:.2f} s ({phase['share']:.0%})"
        for name, phase in found["phases"].items()
    )
    rates = found["tokens_per_s_per_gpu"].items()
    tokens = (f"{'n/a' if rate is None else format(rate, '.1f')} {kind}" for kind, rate in rates)
    mfu = "n/a" if found["mfu"] is None else f"{found['mfu']:.1%}"
    return [
        f"mean step {found['step_s']:.2f} s: {', '.join(phases)}",
        f"tokens a second per GPU: {', '.join(tokens)}; MFU of training: {mfu}",
    ]
