"""A run with recorded phases, and engines that fail while they sleep or wake. On every rank."""

import os
import signal
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_espo.megatron.offload import PARTS
from tests.support.ranks.sync import PROMPT_IDS, change, start
from tests.support.real_engine import sample


def train_watched(file: str, overrides: list[str]) -> list[list[Any]]:
    """Train; return for each phase its name, the parts on the device and the engine's state.

    The parts are the same on all ranks; the engine is rank 0's.
    """
    from megatron_espo.config import load_config
    from megatron_espo.rollout.sampler import Sampler
    from megatron_espo.rollout.vllm_engine import VLLMEngine
    from megatron_espo.trainer import train as trainer

    trainer.distributed_runtime.shutdown = lambda: None  # the launcher ends the process group
    runs, seen = [], []

    def note(name: str) -> None:
        if runs:
            offloader, engine = runs[0].actor.offloader, runs[0].rollouts.engine
            present = [
                part
                for part in PARTS
                if sum(storage.nbytes() for storage in offloader._storages(part))
            ]
            seen.append([name, present, engine and str(engine.state)])

    def watch(owner: Any, method: str, name: str, before: Callable = lambda run: None) -> None:
        original = getattr(owner, method)

        def recorded(*args, **options):
            before(args[0])
            note(name)
            return original(*args, **options)

        setattr(owner, method, recorded)

    watch(trainer.Run, "__enter__", "begin", runs.append)
    watch(Sampler, "batch", "generate")
    watch(trainer.Actor, "update", "update")
    watch(trainer.WeightSync, "push", "push")
    watch(VLLMEngine, "canary", "canary")
    watch(trainer.Checkpoints, "save", "save")
    watch(trainer, "save_hf", "export")
    trainer.train(load_config(file, overrides))
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(
        everyone, [entry[:2] for entry in seen if entry[0] in ("update", "push", "save", "export")]
    )
    assert all(entries == everyone[0] for entries in everyone)
    return seen


def sleep_and_fail(folder: str) -> list[dict[str, float]]:
    """Return the metrics of pushes to engines that slept or failed.

    One engine dies asleep, its successor fails on waking, another dies while it falls asleep.
    """
    actor, engine, sync = start(folder, verify_every=2, max_restarts=2, sleep=True, tensor=2)
    metrics = [sync.push(0)]
    sync.sleep()
    assert engine is None or engine.state == "asleep"
    change(actor, 1.1)
    metrics.append(sync.push(1))

    sync.sleep()
    if engine is not None:
        os.kill(engine._server.pid, signal.SIGKILL)
        start_engine = engine.start

        def start_and_fail_to_wake():
            start_engine()
            engine.start, engine.wake = start_engine, killed_on_waking

        def killed_on_waking(shapes):
            del engine.wake
            os.kill(engine._server.pid, signal.SIGKILL)
            engine.wake(shapes)

        engine.start = start_and_fail_to_wake
    metrics.append(sync.push(2))

    if engine is not None:
        os.kill(engine._server.pid, signal.SIGKILL)
    sync.sleep()
    assert engine is None or engine.state == "dead"
    sync.sleep()  # a dead engine sleeps well
    metrics.append(sync.push(3))
    if engine is not None:
        assert {int(found.versions[0]) for (found,) in sample(engine, PROMPT_IDS, seed=3)} == {3}
        engine.close()
    return metrics
