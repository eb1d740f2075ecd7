"""Memory of real training steps and transfers on a rank, to compare with the plan."""

import gc
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_espo.config import Config
from megatron_espo.data.packing import PackingSpec, TrainSequence, batch_totals, pack
from megatron_espo.distributed import runtime
from tests.support.weights_models import load_spec


class Allocated:
    """Counts CPU bytes allocated and not freed inside: ``now`` at the end, and their ``peak``."""

    def __enter__(self) -> "Allocated":
        self._profile = profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
        )
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        gc.collect()
        self._profile.__exit__(*error)
        events = [
            e for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"
        ]
        self.now = self.peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            self.now += event.nbytes()
            self.peak = max(self.peak, self.now)


def measure_step(settings: dict[str, Any], lengths: list[int]) -> dict[str, int]:
    """Train a step, offload, restore, train another; return bytes.

    ``static``: held between steps; ``peak``: above it in the second step; ``canary`` and
    ``rollouts``: held with parts offloaded; ``host``: of the offloaded parts.
    """
    from megatron_espo.megatron.forward_step import make_forward_step
    from megatron_espo.megatron.model import build_model
    from megatron_espo.megatron.offload import PARTS, Offloader
    from megatron_espo.megatron.train_engine import TrainEngine

    config = Config.model_validate(settings)
    spec = load_spec(config.model.path)
    groups = runtime.initialize(**runtime.parallel_sizes(config.megatron)).groups
    dtype = getattr(torch, config.model.dtype)
    generator = torch.Generator().manual_seed(3)

    def micro_batch():
        ids = [
            torch.randint(0, spec.vocab_size, (n,), generator=generator).tolist() for n in lengths
        ]
        sequences = [
            TrainSequence(tokens[:1], tokens[1:], [-1.0] * (len(tokens) - 1), 1.0) for tokens in ids
        ]
        totals = batch_totals(
            sequences, num_responses=len(ids), num_response_tokens=sum(lengths) - len(ids)
        )
        batches = pack(sequences, totals, PackingSpec(sum(lengths), 0, 1))
        assert len(batches) == 1 and batches[0].tokens.numel() == sum(lengths)
        return batches

    with Allocated() as held:
        chunks = build_model(spec, config.megatron, groups, dtype=dtype)
        for parameter in chunks[0].parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        policy = TrainEngine(chunks, groups, config.optimizer, train_steps=2)
        budget = config.megatron.head_memory_mib
        forward_step = make_forward_step(
            config.algorithm,
            groups=groups,
            vocab_size=spec.vocab_size,
            head_budget_bytes=budget and budget << 20,
        )
        policy.step(forward_step, micro_batch())
    offloader = Offloader(policy, PARTS)
    left = {}
    # The profiler sees a free if it saw the allocation, so all comes back first.
    for phase, parts in (
        ("canary", ("optimizer", "gradients")),
        ("rollouts", PARTS),
        ("training", ()),
    ):
        offloader.to_host(*PARTS)
        with Allocated() as rest:
            offloader.to_device(*PARTS)
            offloader.to_host(*parts)
        left[phase] = rest.now
    with Allocated() as step:
        policy.step(forward_step, micro_batch())
    elsewhere = held.now - left.pop("training")
    left = {phase: elsewhere + bytes_ for phase, bytes_ in left.items()}
    return {"static": held.now, "peak": step.peak, **left, "host": offloader.host_bytes}
