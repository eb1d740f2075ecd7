"""What a real training step takes on a rank, to compare with the plan."""

import gc
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from megatron_espo.config import Config
from megatron_espo.data.packing import TrainSequence, batch_totals, pack
from megatron_espo.mcore import runtime


class Allocated:
    """Bytes allocated and not freed since it was entered: ``now`` when it was left, and their ``peak``; every CPU allocation counts."""

    def __enter__(self) -> "Allocated":
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        gc.collect()
        self._profile.__exit__(*error)
        events = [e for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        self.now = self.peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            self.now += event.nbytes()
            self.peak = max(self.peak, self.now)


def measure_step(settings: dict[str, Any], lengths: list[int]) -> dict[str, int]:
    """Build, train one step, give the memory away and take it back, train another: bytes held between steps, the peak above them in the second,
    bytes held without what has left then (``canary``: all but the weights), and what of it lies on the host."""
    from megatron_espo.mcore.forward_step import make_forward_step
    from megatron_espo.mcore.model import Layout, build_model
    from megatron_espo.mcore.offload import PARTS, Offloader
    from megatron_espo.mcore.optimizer import Policy

    config = Config.model_validate(settings)
    hf_config = json.loads(Path(config.model.path, "config.json").read_text())
    groups = runtime.initialize(**runtime.parallel_sizes(config.megatron)).groups
    layout = Layout.of(config.megatron)
    dtype = getattr(torch, config.model.dtype)
    generator = torch.Generator().manual_seed(3)

    def micro_batch():
        ids = [torch.randint(0, hf_config["vocab_size"], (n,), generator=generator).tolist() for n in lengths]
        sequences = [TrainSequence(tokens[:1], tokens[1:], [-1.0] * (len(tokens) - 1), 1.0) for tokens in ids]
        totals = batch_totals(sequences, num_responses=len(ids), num_response_tokens=sum(lengths) - len(ids))
        batches = pack(sequences, totals, data_parallel_rank=0, data_parallel_size=1, max_tokens=sum(lengths))
        assert len(batches) == 1 and batches[0].tokens.numel() == sum(lengths)
        return batches

    with Allocated() as held:
        chunks = build_model(hf_config, layout, groups, dtype=dtype, transformer_impl="local")
        for parameter in chunks[0].parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        policy = Policy(chunks, groups, config.optimizer, train_steps=2)
        budget = config.megatron.head_memory_mib
        forward_step = make_forward_step(
            config.algorithm,
            groups=groups,
            vocab_size=hf_config["vocab_size"],
            head_budget_bytes=budget and budget << 20,
        )
        policy.step(forward_step, micro_batch())
    offloader = Offloader(policy, PARTS)
    left = {}
    # The profiler sees a free if it saw the allocation, so all comes back first.
    for phase, parts in (("canary", ("optimizer", "gradients")), ("rollouts", PARTS), ("training", ())):
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


def stream_peak(folder: str, sizes: dict[str, Any]) -> int:
    """The most extra bytes that any rank holds while a model's weights are streamed."""
    from megatron_espo.mcore.model import Layout, build_model, read_hf_config
    from megatron_espo.weights import MegatronWeightSource

    groups = runtime.initialize(**sizes).groups
    hf_config = read_hf_config(folder)
    chunks = build_model(hf_config, Layout(**sizes), groups, dtype=torch.float32, transformer_impl="local")
    source = MegatronWeightSource(chunks, hf_config, groups, dtype=torch.float32)
    passes = []
    for _ in range(3):  # gloo's threads may let go of a buffer late, which is not the stream's doing
        with Allocated() as extra:
            for _ in source:
                pass
        passes.append(extra.peak)
        dist.barrier()
    peaks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, min(passes))
    return max(peaks)
