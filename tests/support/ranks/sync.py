"""Weight updates from Megatron ranks into an engine, with and without faults."""

import json
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_espo.config import Config
from megatron_espo.config.checks import check_model
from megatron_espo.distributed import runtime
from megatron_espo.distributed.monitored_barrier import MonitoredBarrier
from megatron_espo.models.registry import read_spec
from megatron_espo.rollout.engine import EngineError
from megatron_espo.types import Prompt
from megatron_espo.weights.hf_io import save_hf
from tests.support.real_engine import engine_config, living_in_group, sample
from tests.support.weights_models import load_spec

PROMPTS = [Prompt(f"row-{i}", "", "", tuple(range(4 + i, 10 + 2 * i))) for i in range(4)]
PROMPT_IDS = [prompt.token_ids for prompt in PROMPTS]


def start(
    folder: str,
    engine_type=None,
    exporter: str | None = None,
    tensor: int = 1,
    pipeline: int = 1,
    expert: int = 1,
    dtype: str = "float32",
    **rollout,
):
    """Return actor, engine (on rank 0) and weight sync."""
    from megatron_espo.distributed import cpu

    cpu.install()
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    sizes = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    sizes["expert_model_parallel_size"] = expert
    place = runtime.initialize(**sizes)
    from megatron_espo.megatron.actor import Actor
    from megatron_espo.rollout.http_client import LoopThread
    from megatron_espo.rollout.vllm_engine import VLLMEngine
    from megatron_espo.weights.sync import WeightSync

    settings = {"temperature": 0.7, "timeout_s": 60.0, "max_response_tokens": 12} | rollout
    config = Config.model_validate(
        {
            "model": {"path": folder, "dtype": dtype, "exporter": exporter},
            "algorithm": {"rollout_correction": "token"},
            "megatron": sizes,
            "rollout": settings,
            "data": {"prompts": "reasoning_gym:chain_sum"},
        }
    )
    spec = check_model(config)
    engine = None
    if place.is_main:
        engine = (engine_type or VLLMEngine)(
            engine_config(
                folder,
                folder,
                tensor_parallel_size=config.rollout.tensor_parallel_size,
                sleep=config.rollout.sleep,
                dtype=dtype,
                quantization=config.rollout.quantization,
            ),
            LoopThread(),
        )
        engine.start()
    actor = Actor(config, spec, place)
    return (
        actor,
        engine,
        WeightSync(config, spec, actor, place, engine, PROMPTS if engine else []),
    )


@torch.no_grad()
def change(actor, factor: float = 1.3) -> None:
    """Change the policy, equally on all ranks."""
    for chunk in actor.chunks:
        for parameter in chunk.parameters():
            parameter.mul_(factor)


def failure(sync, version: int) -> str:
    """Return the error message of a push; a failed gather is reported by each rank itself."""
    try:
        sync.push(version)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    else:
        message = "no error"
    messages = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    assert len(set(messages)) == 1 or all("phase gather" in text for text in messages), messages
    return messages[0]


def sync_and_recover(folder: str, kill: bool, **sizes) -> dict:
    """Push five versions; with ``kill`` the engine is killed between two pushes and inside one."""
    actor, engine, sync = start(folder, verify_every=2, max_restarts=1, **sizes)
    metrics = []
    for version in range(4):
        metrics.append(sync.push(version))
        change(actor, 1.1)
    if kill:
        if engine is not None:
            os.kill(engine._server.pid, signal.SIGKILL)
            try:
                engine._worker("ping")
            except EngineError as error:
                assert "has died" in str(error), error
            assert engine.state == "dead"
        sync.recover()
        if engine is not None:
            assert engine.state == "running" and engine.next_version == 3
            arm_killer(engine)
    metrics.append(sync.push(4))
    found = [group[0] for group in sample(engine, PROMPT_IDS, seed=3)] if engine is not None else []
    assert all(set(generation.versions) == {4} for generation in found)
    box = [
        [
            (ids, tuple(generation.token_ids.tolist()), None)
            for ids, generation in zip(PROMPT_IDS, found, strict=False)
        ]
    ]
    dist.broadcast_object_list(box, src=0)
    trained = actor.score(box[0])
    if engine is None:
        return {}
    engine.close()
    gap = max(
        abs(a - b)
        for one, other in zip(found, trained, strict=True)
        for a, b in zip(one.logprobs.tolist(), other, strict=True)
    )
    return {"metrics": metrics, "gap": gap}


def arm_killer(engine) -> None:
    """Kill the engine's process in the middle of its next update, once."""
    deliver, calls = engine.update_weights, []

    def update_weights(info):
        calls.append(info)
        if len(calls) == 2:
            os.kill(engine._server.pid, signal.SIGKILL)
        deliver(info)

    engine.update_weights = update_weights


def faults(folder: str) -> dict[str, str]:
    """Return the errors for a damaged tensor, and for an engine that loads nothing."""
    from megatron_espo.rollout.vllm_engine import VLLMEngine

    class IdleTransfer(VLLMEngine):
        """An engine whose weight transfer answers OK and does nothing."""

        is_idle = False

        def start_weight_update(self):
            if not self.is_idle:
                super().start_weight_update()

        def update_weights(self, info):
            None if self.is_idle else super().update_weights(info)

        def finish_weight_update(self, weight_version=None):
            if not self.is_idle:
                super().finish_weight_update(weight_version)

    def set_idle(value: bool) -> None:
        if engine is not None:
            engine.is_idle = value

    actor, engine, sync = start(folder, IdleTransfer, max_restarts=0, tensor=2)
    found = {}
    set_idle(True)
    found["nothing loaded at start"] = failure(sync, 0)
    set_idle(False)
    sync.push(1)
    change(actor)
    set_idle(True)
    found["nothing loaded later"] = failure(sync, 2)
    set_idle(False)
    damage_in_transit("model.layers.1.self_attn.k_proj.weight")
    found["damaged"] = failure(sync, 4)
    if engine is not None:
        assert engine.state == "dead"
    return found


def quantized(folder: str, swap: list[str], **sizes) -> dict:
    """Push two versions to a quantized engine, then one with two tensors exchanged in transit."""
    from megatron_espo.rollout.file_transport import FileTrainerWeightTransferEngine as Sender

    actor, engine, sync = start(folder, dtype="bfloat16", quantization="fp8", **sizes)
    metrics = [sync.push(0)]
    change(actor, 1.1)
    metrics.append(sync.push(1))
    table = []
    if engine is not None:
        path = engine.config.log_path.with_suffix(".quantization.jsonl")
        table = [json.loads(line) for line in path.read_text().splitlines()]
    write = Sender._write

    def exchange(self, index, names, tensors):
        given = dict(zip(names, tensors, strict=True))
        if swap[0] in given:
            given[swap[0]], given[swap[1]] = given[swap[1]], given[swap[0]]
        return write(self, index, names, [given[name] for name in names])

    Sender._write = exchange
    return {"metrics": metrics, "table": table, "error": failure(sync, 2)}


def damage_in_transit(name: str) -> None:
    """Flip a bit of this tensor between sender and engine from now on."""
    from megatron_espo.rollout.file_transport import FileTrainerWeightTransferEngine as Sender

    write = Sender._write

    def flip(self, index, names, tensors):
        info = write(self, index, names, tensors)
        if name in names:
            with open(self._paths[index], "r+b") as file:
                file.seek(info.offsets[names.index(name)])
                (byte,) = file.read(1)
                file.seek(-1, 1)
                file.write(bytes([byte ^ 4]))
        return info

    Sender._write = flip


def sync_two_workers(folder: str, out: str, expert: int = 1) -> dict:
    """Update an engine of two workers from two Megatron ranks; also export to ``out``."""
    sizes = {"expert": expert} if expert > 1 else {"tensor": 2}
    actor, engine, sync = start(folder, tensor_parallel_size=2, **sizes)
    change(actor)
    metrics = sync.push(0)
    change(actor, 0.9)
    sync._config = sync._config.model_copy(update={"verify_every": 1})
    metrics = sync.push(1)
    assert (sync._source.checksums is None) == (engine is None), "only ranks with an engine compare"
    save_hf(actor.chunks, load_spec(folder), out, folder, actor.groups, torch.float32)
    if engine is None:
        return {}
    found = [generation for (generation,) in sample(engine, PROMPT_IDS, seed=3)]
    group, processes = engine._server.pid, len(living_in_group(engine._server.pid))
    engine.close()
    deadline = time.monotonic() + 10
    while living_in_group(group) and time.monotonic() < deadline:
        time.sleep(0.1)  # they are killed; the kernel takes its time
    return {
        "samples": [
            (generation.token_ids.tolist(), generation.logprobs.tolist()) for generation in found
        ],
        "sent": sync._source.checksums,
        "metrics": metrics,
        "processes": processes,
        "left": living_in_group(group),
    }


def exporter_faults(folder: str) -> dict[str, str]:
    """Return the errors of wrong exporters, and the metrics of a correct one."""
    found = {}
    for name in ("transposed", "renamed", "fickle"):
        actor, engine, sync = start(
            folder, exporter=f"tests.support.ranks.sync:{name}", max_restarts=0
        )
        found[name] = failure(sync, 0)
        if engine is not None:
            assert engine.state != "ready"
            engine.close()
    actor, engine, sync = start(folder, exporter="tests.support.ranks.sync:whole")
    found["whole"] = sync.push(0)
    if engine is not None:
        engine.close()
    return found


def whole(chunks, hf_config):
    """A correct exporter that yields the final norm and the head before the layers."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_espo.weights.source import WeightGatherer

    assert parallel_state.is_initialized()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    spec, options = read_spec(hf_config), {"dtype": torch.float32, "all_replicas": True}
    source = WeightGatherer(chunks, spec, groups, **options)
    return iter(sorted(source, key=lambda item: "layers" in item[0]))


def transposed(chunks, hf_config):
    return (
        (name, tensor.T if "mlp.up_proj" in name else tensor)
        for name, tensor in whole(chunks, hf_config)
    )


def renamed(chunks, hf_config):
    return (
        (name.replace("1.mlp.up_proj", "1.mlp.upper_proj"), tensor)
        for name, tensor in whole(chunks, hf_config)
    )


fickle_passes = []


def fickle(chunks, hf_config):
    """Changes the order in the second pass."""
    fickle_passes.append(1)
    items = list(whole(chunks, hf_config))
    return iter(items if len(fickle_passes) % 2 else items[::-1])


def die_midway(folder: str, pid_file: str) -> None:
    """Kill rank 0 while the engine loads the second group."""
    _, engine, sync = start(folder, tensor=2, tensor_parallel_size=2)
    sync.push(0)
    if engine is not None:
        Path(pid_file).write_text(
            f"{engine._server.pid} {len(living_in_group(engine._server.pid))}"
        )
        deliver, calls = engine.update_weights, []

        def update_weights(info):
            calls.append(info)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            deliver(info)

        engine.update_weights = update_weights
    sync.push(1)


def freeze_midway(folder: str, rank: int, out: str) -> None:
    """Stop ``rank`` (SIGSTOP) in the second push; the other writes its error and the seconds."""
    actor, engine, sync = start(folder, tensor=2, canary_prompts=0)
    sync.push(0)  # with time for the engine to start
    sync._barrier = sync._source._inner._barrier = MonitoredBarrier(4.0, 16.0)
    pids = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    if dist.get_rank() == rank:
        wait, waits = sync._barrier.wait, []

        def stop(what):
            waits.append(what)
            if len(waits) == 2:  # for the second group
                os.kill(os.getpid(), signal.SIGSTOP)
            wait(what)

        sync._barrier.wait = stop
    began = time.monotonic()
    try:
        sync.push(1)
    except Exception as error:
        assert engine is None or engine.state == "dead"
        Path(out).write_text(
            json.dumps([f"{type(error).__name__}: {error}", time.monotonic() - began])
        )
        os.kill(pids[rank], signal.SIGKILL)  # a stopped process would keep torchrun waiting
        raise
