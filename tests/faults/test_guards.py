"""Gradient spikes against a hand-computed median; out-of-memory errors name the setting."""

import types

import pytest
import torch

from megatron_espo.config import Megatron, Optimizer
from megatron_espo.megatron import guards


def test_a_spike_is_far_above_the_median_of_recent_norms(monkeypatch):
    monkeypatch.setattr(guards, "LEAST_NORMS", 3)
    monkeypatch.setattr(guards, "SPIKE_WINDOW", 3)
    guard = guards.SpikeGuard(factor=3.0)
    assert [guard.check(norm) for norm in (9.0, 1.0, 2.0)] == [None] * 3, "no median yet"
    assert (
        "norm 6.5 is above optimizer.spike_factor 3 times the median 2 of the last 3"
        in guard.check(6.5)
    )
    assert guard.check(6.0) is None and list(guard.norms) == [1.0, 2.0, 6.0], (
        "a spike is not recorded"
    )


def fail_in(file: str, error: Exception):
    """Return a function that raises, compiled as code of ``file``."""
    space = {"error": error}
    exec(compile("def fail():\n    raise error", file, "exec"), space)
    return space["fail"]


LOWER = "lower megatron.max_tokens_per_micro_batch (16384)"
HEAD = "/x/megatron_espo/numerics/head.py"
CASES = [
    (HEAD, {}, f"in the output layer: set megatron.head_memory_mib (null), or {LOWER}"),
    (HEAD, {"head_memory_mib": 512}, "in the output layer: lower megatron.head_memory_mib (512)"),
    (
        "/x/megatron/core/optimizer/optimizer.py",
        {},
        "in the optimizer: use more ranks with optimizer.use_distributed_optimizer (true)",
    ),
    (
        "/x/megatron/core/transformer/mlp.py",
        {},
        f"in the layers: {LOWER}, or set megatron.recompute_granularity (null) to full",
    ),
]


@pytest.mark.parametrize(("file", "settings", "advice"), CASES)
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory.\nmore"),
        (RuntimeError, "DefaultCPUAllocator: can't allocate memory"),
        (MemoryError, ""),
    ],
)
def test_the_knob_is_named(monkeypatch, file, settings, advice, kind, text):
    monkeypatch.setattr(guards, "dist", types.SimpleNamespace(get_rank=lambda: 3))
    with (
        pytest.raises(guards.OutOfMemory) as caught,
        guards.oom_hint(Megatron(**settings), Optimizer()),
    ):
        fail_in(file, kind(text))()
    message = str(caught.value)
    assert (
        message.startswith("rank 3 is out of memory ") and advice in message and "\n" not in message
    ), message


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="^else$"), guards.oom_hint(Megatron(), Optimizer()):
        raise RuntimeError("else")
