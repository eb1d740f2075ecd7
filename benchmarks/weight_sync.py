"""Weight updates from Megatron ranks into a vLLM engine, compared with a plain copy of the bytes.

    python benchmarks/weight_sync.py models/SmolLM2-135M-Instruct [--sleep]
    torchrun --nproc-per-node 3 benchmarks/weight_sync.py models/SmolLM2-135M-Instruct --tensor 3

Each round copies the model's bytes once inside this process (both sides warm), then updates once,
so other load on the machine slows both. An update ends when vLLM can serve: weights are gathered,
checked, loaded and repacked. On a GPU the transport is ``ipc`` and the copy is within the GPU.
"""

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from measure import seconds

from megatron_espo.distributed import runtime

HAS_GPU = torch.cuda.is_available()
TRANSPORT = "ipc" if HAS_GPU else "files"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--tensor", type=int, default=1, help="Megatron's tensor-parallel size")
    sleep = "the engine sleeps before each update; its weights wake as NaN"
    parser.add_argument("--sleep", action="store_true", help=sleep)
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    world = runtime.initialize(tensor_model_parallel_size=args.tensor)
    with tempfile.TemporaryDirectory() as folder:
        engine = start_engine(args, folder) if world.is_main else None
        try:
            measure(args, world, engine)
        finally:
            if engine is not None:
                engine.close()
    dist.barrier()
    runtime.shutdown()


def start_engine(args: argparse.Namespace, folder: str):
    from megatron_espo.rollout.http_client import LoopThread
    from megatron_espo.rollout.server import EngineConfig
    from megatron_espo.rollout.vllm_engine import VLLMEngine

    config = EngineConfig(
        model=args.model,
        folder=folder,
        dtype=args.dtype,
        transport=TRANSPORT,
        max_model_len=256,
        sleep=args.sleep and HAS_GPU,
        engine_args={"kv_cache_memory_bytes": 1 << 28}
        | ({"enforce_eager": True} if args.eager else {}),
    )
    engine = VLLMEngine(config, LoopThread())
    engine.start()
    if HAS_GPU:  # vLLM measures the free memory while it starts
        engine.wait_ready()
    return engine


def update(transport, engine, version: int, sleeps: bool) -> None:
    """A weight update as ``WeightSync`` makes it, without its checks."""
    from megatron_espo.rollout.transport import send_weights

    send_weights(transport, engine, version)
    if engine is not None:
        if sleeps:
            engine.wake_caches()
        engine.resume()
        engine.serve()


class Timed:
    """Another source, with the seconds that its last pass took."""

    def __init__(self, inner) -> None:
        self._inner, self.seconds = inner, 0.0

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def iter_groups(self):
        self.seconds, groups = 0.0, self._inner.iter_groups()
        while True:
            began = time.perf_counter()
            group = next(groups, None)
            self.seconds += time.perf_counter() - began
            if group is None:
                return
            yield group
            del group  # the next gather needs the memory


def measure(args: argparse.Namespace, world: runtime.Runtime, engine) -> None:
    from megatron_espo.config import Megatron
    from megatron_espo.distributed.monitored_barrier import MonitoredBarrier
    from megatron_espo.megatron.model import build_model
    from megatron_espo.models.registry import read_spec
    from megatron_espo.rollout.transport import make_trainer_transport
    from megatron_espo.weights.hf_io import load_hf_weights
    from megatron_espo.weights.vllm_source import MegatronWeightSource, ObservedSource

    spec = read_spec(json.loads(Path(args.model, "config.json").read_text()))
    dtype = getattr(torch, args.dtype)
    layout = Megatron(tensor_model_parallel_size=args.tensor)
    chunks = build_model(spec, layout, world.groups, dtype=dtype)
    load_hf_weights(chunks, spec, args.model, world.groups)
    barrier = MonitoredBarrier(600, 600)
    timed = Timed(MegatronWeightSource(chunks, spec, world.groups, dtype=dtype, barrier=barrier))
    source = ObservedSource(timed, world.world_size)
    shapes = {meta.name: tuple(meta.shape) for meta in source.metadata()}
    sizes = {
        meta.name: meta.dtype.itemsize * torch.Size(meta.shape).numel()
        for meta in source.metadata()
    }
    groups = [sum(sizes[name] for name in names) for names in source.groups()]
    total = sum(groups)
    if engine is not None:
        engine.wait_ready()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of resident memory
    before = resident("VmRSS")
    transport = make_trainer_transport(TRANSPORT, engine=engine, source=source, rank=world.rank)
    for version in (0, 1):
        update(transport, engine, version, False)
    extra = resident("VmHWM") - before
    a = torch.ones(total, dtype=torch.uint8, device=world.device)
    b = torch.zeros_like(a)
    rounds = []
    for version in range(2, args.rounds + 2):
        dist.barrier()
        row = {"memcpy": seconds(lambda: b.copy_(a))}
        dist.barrier()
        if engine is not None and args.sleep:
            row["sleep"] = seconds(engine.sleep)
            row["wake, fill with NaN"] = seconds(lambda: engine.wake(list(shapes.items())))
        dist.barrier()
        row["sync"] = seconds(lambda v=version: update(transport, engine, v, args.sleep))
        if engine is not None:
            row["gather"] = timed.seconds
            rounds.append(row)
    if engine is not None:
        report(rounds, total, groups, extra)


def report(rounds: list[dict[str, float]], total: int, groups: list[int], extra: int) -> None:
    """Print medians over the rounds, and the extra memory of the trainer."""
    print(f"{total / 1e6:.0f} MB in {len(groups)} groups, {len(rounds)} rounds, medians")
    for name in rounds[0]:
        value = median(row[name] for row in rounds)
        print(f"  {name:<18} {value * 1e3:7.1f} ms  {total / value / 1e9:6.2f} GB/s")
    share = median(row["memcpy"] / row["sync"] for row in rounds)
    print(f"an update, vLLM's load and repacking included: {share:.0%} of memcpy's speed")
    layer, largest = median(groups), max(groups)
    print(
        f"trainer's extra memory: {extra / 1e6:.1f} MB = {extra / largest:.2f} of the largest "
        f"group ({largest / 1e6:.1f} MB, the embedding) = {extra / layer:.1f} decoder layers "
        f"({layer / 1e6:.1f} MB)"
    )


def resident(field: str) -> int:
    """``VmRSS`` (resident bytes now) or ``VmHWM`` (their peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


if __name__ == "__main__":
    main()
