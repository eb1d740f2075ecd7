"""Weights from Megatron ranks into a vLLM engine, against a plain copy of the same bytes in the same run.

    python benchmarks/weight_sync.py models/SmolLM2-135M-Instruct [--sleep]
    torchrun --nproc-per-node 3 benchmarks/weight_sync.py models/SmolLM2-135M-Instruct --tensor 3

Each round copies the model's bytes once inside this process (both sides warm), then syncs once, in turn, so that whatever
else the machine does meets both. A sync ends when vLLM could serve: gathered, checked, loaded and repacked.
"""

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_espo.mcore import runtime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--tensor", type=int, default=1, help="Megatron's tensor-parallel size")
    parser.add_argument("--sleep", action="store_true", help="the engine sleeps before each sync, and wakes with NaN")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    place = runtime.initialize(tensor_model_parallel_size=args.tensor)
    with tempfile.TemporaryDirectory() as folder:
        engine = start_engine(args, folder) if place.is_main else None
        try:
            measure(args, place, engine)
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
        transport="files",
        max_model_len=256,
        engine_args={"kv_cache_memory_bytes": 1 << 28},
    )
    engine = VLLMEngine(config, LoopThread())
    engine.start()
    return engine


def sync(transport, engine, version: int, sleeps: bool) -> None:
    """An update without its checks, as ``WeightSync`` makes it."""
    from megatron_espo.rollout.transport import send_weights

    send_weights(transport, engine, version)
    if engine is not None:
        if sleeps:
            engine.wake_caches()
        engine.resume()
        engine.serve()


def measure(args: argparse.Namespace, place: runtime.Runtime, engine) -> None:
    from megatron_espo.mcore.model import Layout, build_model, read_hf_config
    from megatron_espo.rollout.transport import make_trainer_transport
    from megatron_espo.weights.hf_io import load_hf_weights
    from megatron_espo.weights.lockstep import Lockstep
    from megatron_espo.weights.vllm_source import MegatronWeightSource, ObservedSource

    hf_config, dtype = read_hf_config(args.model), getattr(torch, args.dtype)
    layout = Layout(tensor_model_parallel_size=args.tensor)
    chunks = build_model(hf_config, layout, place.groups, dtype=dtype)
    load_hf_weights(chunks, hf_config, args.model, place.groups)
    lockstep = Lockstep(600, 600)
    source = ObservedSource(
        MegatronWeightSource(chunks, hf_config, place.groups, dtype=dtype, lockstep=lockstep), place.world_size
    )
    shapes = [(meta.name, tuple(meta.shape)) for meta in source.metadata()]
    sizes = {meta.name: meta.dtype.itemsize * torch.Size(meta.shape).numel() for meta in source.metadata()}
    groups = [sum(sizes[name] for name in names) for names in source.groups()]
    total = sum(groups)
    if engine is not None:
        engine.wait_ready()
    before = reset_peak()
    transport = make_trainer_transport("files", engine=engine, source=source, rank=place.rank)
    sync(transport, engine, 0, False)
    sync(transport, engine, 1, False)
    extra = peak() - before
    a, b = torch.ones(total, dtype=torch.uint8), torch.zeros(total, dtype=torch.uint8)
    rounds = []
    for version in range(2, args.rounds + 2):
        dist.barrier()
        copy = seconds(lambda: b.copy_(a))
        dist.barrier()
        if engine is not None:
            transport.seconds.clear()
        row = {}
        if engine is not None and args.sleep:
            row |= {"sleep": seconds(engine.sleep), "wake, fill with NaN": seconds(lambda: engine.wake(shapes))}
        dist.barrier()
        row |= {"sync": seconds(lambda v=version: sync(transport, engine, v, args.sleep)), "memcpy": copy}
        if engine is not None:
            row |= {f"engine: {name}": value for name, value in engine.transfer_seconds().items()}
            row |= {f"trainer: {name}": value for name, value in transport.seconds.items()} | {"trainer: gather": source.seconds}
            rounds.append(row)
    if engine is not None:
        report(rounds, total, groups, extra)


def report(rounds: list[dict[str, float]], total: int, groups: list[int], extra: int) -> None:
    middle = {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}
    share = statistics.median(row["memcpy"] / row["sync"] for row in rounds)
    arrival = statistics.median(
        row["memcpy"] / (row["trainer: gather"] + row["trainer: write"] + row["engine: checksum"]) for row in rounds
    )
    added = statistics.median(row["memcpy"] / (row["sync"] - row["engine: load"] - row["engine: finish"]) for row in rounds)
    print(f"{total / 1e6:.0f} MB in {len(groups)} groups, {len(rounds)} rounds, medians")
    for name, value in middle.items():
        print(f"  {name:<18} {value * 1e3:7.1f} ms  {total / value / 1e9:6.2f} GB/s")
    print(f"into the engine's memory (gather, write, checksums): {arrival:.0%} of memcpy's speed")
    print(f"what that adds to vLLM's load, which it overlaps with: {added:.0%} of memcpy's speed")
    print(f"until it could serve (vLLM's load and repacking too): {share:.0%} of memcpy's speed")
    layer = statistics.median(groups)
    print(
        f"trainer's extra memory: {extra / 1e6:.1f} MB = {extra / max(groups):.2f} of the largest group "
        f"({max(groups) / 1e6:.1f} MB, the embedding) = {extra / layer:.1f} decoder layers ({layer / 1e6:.1f} MB)"
    )


def seconds(action) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def reset_peak() -> int:
    """Resident bytes now; the peak counts from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


if __name__ == "__main__":
    main()
