"""Weight syncs from real Megatron ranks into a real engine, with and without faults; runs on every rank."""

import json
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_espo.config import Config
from megatron_espo.mcore import runtime
from megatron_espo.mcore.model import read_hf_config
from megatron_espo.rollout.engine import EngineError
from megatron_espo.types import Prompt
from megatron_espo.weights.hf_io import save_hf
from tests.real_engine import engine_config, living_in_group, sample

PROMPTS = [Prompt(f"row-{i}", "", "", tuple(range(4 + i, 10 + 2 * i))) for i in range(4)]
PROMPT_IDS = [prompt.token_ids for prompt in PROMPTS]


def start(folder: str, engine_type=None, exporter: str | None = None, tensor: int = 1, pipeline: int = 1, expert: int = 1, **rollout):
    """Config, learner, engine (rank 0) and sync on this rank."""
    from megatron_espo.mcore import cpu

    cpu.install()
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    sizes = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    sizes["expert_model_parallel_size"] = expert
    place = runtime.initialize(**sizes)
    from megatron_espo.mcore.learner import Learner
    from megatron_espo.rollout.http_client import LoopThread
    from megatron_espo.rollout.vllm_engine import VLLMEngine
    from megatron_espo.weights.sync import WeightSync

    settings = {"temperature": 0.7, "timeout_s": 60.0, "max_response_tokens": 12} | rollout
    config = Config.model_validate(
        {
            "model": {"path": folder, "dtype": "float32", "exporter": exporter},
            "megatron": sizes,
            "rollout": settings,
            "data": {"prompts": "reasoning_gym:chain_sum"},
        }
    )
    hf_config = config.validate_model()
    engine = None
    if place.is_main:
        engine = (engine_type or VLLMEngine)(
            engine_config(folder, folder, tensor_parallel_size=config.rollout.tensor_parallel_size, sleep=config.rollout.sleep),
            LoopThread(),
        )
        engine.start()
    learner = Learner(config, hf_config, place)
    return learner, engine, WeightSync(config, hf_config, learner, place, engine, PROMPTS if engine else [])


@torch.no_grad()
def change(learner, factor: float = 1.3) -> None:
    """Another policy, the same on all ranks."""
    for chunk in learner.chunks:
        for parameter in chunk.parameters():
            parameter.mul_(factor)


def failure(sync, version: int) -> str:
    """The message of a push that fails, the same on all ranks; of a gather, which each rank reports itself, rank 0's."""
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
    """Four versions; with ``kill`` an engine killed between two syncs and one inside a sync; then what is served."""
    learner, engine, sync = start(folder, verify_every=2, max_restarts=1, **sizes)
    metrics = []
    for version in range(4):
        metrics.append(sync.push(version))
        change(learner, 1.1)
    if kill:
        if engine is not None:
            os.kill(engine.pid, signal.SIGKILL)
            try:
                engine.check_health()
            except EngineError as error:
                assert "has died" in str(error), error
            assert engine.state == "dead"
        sync.recover()
        if engine is not None:
            assert engine.policy_version == 3
            arm_killer(engine)
    metrics.append(sync.push(4))
    found = [group[0] for group in sample(engine, PROMPT_IDS, seed=3)] if engine is not None else []
    assert all(set(generation.versions) == {4} for generation in found)
    box = [[(ids, tuple(generation.token_ids.tolist()), None) for ids, generation in zip(PROMPT_IDS, found, strict=False)]]
    dist.broadcast_object_list(box, src=0)
    trained = learner.score(box[0])
    if engine is None:
        return {}
    engine.close()
    gap = max(abs(a - b) for one, other in zip(found, trained, strict=True) for a, b in zip(one.logprobs.tolist(), other, strict=True))
    return {"metrics": metrics, "gap": gap}


def arm_killer(engine) -> None:
    """Kill the engine's process in the middle of its next update, once."""
    deliver, calls = engine.update_weights, []

    def update_weights(info):
        calls.append(info)
        if len(calls) == 2:
            os.kill(engine.pid, signal.SIGKILL)
        deliver(info)

    engine.update_weights = update_weights


def faults(folder: str) -> dict[str, str]:
    """Messages of syncs that cannot succeed: a damaged tensor, and an engine that answers OK and loads nothing."""
    from megatron_espo.rollout.engine import State
    from megatron_espo.rollout.vllm_engine import VLLMEngine

    class Liar(VLLMEngine):
        """Its weight transfer answers OK and does nothing."""

        lies = False

        def start_weight_update(self):
            self._move(State.UPDATING, "start") if self.lies else super().start_weight_update()

        def update_weights(self, info):
            None if self.lies else super().update_weights(info)

        def finish_weight_update(self, weight_version=None):
            if not self.lies:
                return super().finish_weight_update(weight_version)
            self._arrived_version = self._next_version

    def lie(value: bool) -> None:
        if engine is not None:
            engine.lies = value

    learner, engine, sync = start(folder, Liar, max_restarts=0, tensor=2)
    found = {}
    lie(True)
    found["nothing loaded at start"] = failure(sync, 0)
    lie(False)
    sync.push(1)
    change(learner)
    lie(True)
    found["nothing loaded later"] = failure(sync, 2)
    lie(False)
    damage_in_transit("model.layers.1.self_attn.k_proj.weight")
    found["damaged"] = failure(sync, 4)
    if engine is not None:
        assert engine.state == "dead" and engine.policy_version is None
    return found


def damage_in_transit(name: str) -> None:
    """From now on a bit of this tensor flips between sender and engine."""
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
    """An engine of two tensor-parallel workers, synced from two Megatron ranks; the weights also go to ``out``."""
    sizes = {"expert": expert} if expert > 1 else {"tensor": 2}
    learner, engine, sync = start(folder, tensor_parallel_size=2, **sizes)
    change(learner)
    metrics = sync.push(0)
    change(learner, 0.9)
    sync._config = sync._config.model_copy(update={"verify_every": 1})
    metrics = sync.push(1)
    save_hf(learner.chunks, read_hf_config(folder), out, folder, learner.groups, torch.float32)
    if engine is None:
        return {}
    found = [generation for (generation,) in sample(engine, PROMPT_IDS, seed=3)]
    group, processes = engine.pid, len(living_in_group(engine.pid))
    engine.close()
    deadline = time.monotonic() + 10
    while living_in_group(group) and time.monotonic() < deadline:
        time.sleep(0.1)  # they are killed; the kernel takes its time
    return {
        "samples": [(generation.token_ids.tolist(), generation.logprobs.tolist()) for generation in found],
        "sent": sync._source.checksums,
        "metrics": metrics,
        "processes": processes,
        "left": living_in_group(group),
    }


def exporter_faults(folder: str) -> dict[str, str]:
    """Messages for exporters that do not fit the engine's checkpoint, and the good one's metrics."""
    found = {}
    for name in ("transposed", "renamed", "fickle"):
        learner, engine, sync = start(folder, exporter=f"tests.ranks.sync:{name}", max_restarts=0)
        found[name] = failure(sync, 0)
        if engine is not None:
            assert engine.state != "ready"
            engine.close()
    learner, engine, sync = start(folder, exporter="tests.ranks.sync:whole")
    found["whole"] = sync.push(0)
    if engine is not None:
        engine.close()
    return found


def whole(chunks, hf_config):
    """A user's exporter: the final norm and the head before the layers, as some do."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_espo.weights import MegatronWeightSource

    assert parallel_state.is_initialized()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    source = MegatronWeightSource(chunks, hf_config, groups, dtype=torch.float32, all_replicas=True)
    return iter(sorted(source, key=lambda item: "layers" in item[0]))


def transposed(chunks, hf_config):
    return ((name, tensor.T if "mlp.up_proj" in name else tensor) for name, tensor in whole(chunks, hf_config))


def renamed(chunks, hf_config):
    return ((name.replace("1.mlp.up_proj", "1.mlp.upper_proj"), tensor) for name, tensor in whole(chunks, hf_config))


fickle_passes = []


def fickle(chunks, hf_config):
    """Another order in the second pass."""
    fickle_passes.append(1)
    items = list(whole(chunks, hf_config))
    return iter(items if len(fickle_passes) % 2 else items[::-1])


def die_midway(folder: str, pid_file: str) -> None:
    """Rank 0 kills itself while the engine loads the second group."""
    _, engine, sync = start(folder, tensor=2, tensor_parallel_size=2)
    sync.push(0)
    if engine is not None:
        Path(pid_file).write_text(f"{engine.pid} {len(living_in_group(engine.pid))}")
        deliver, calls = engine.update_weights, []

        def update_weights(info):
            calls.append(info)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            deliver(info)

        engine.update_weights = update_weights
    sync.push(1)


def freeze_midway(folder: str, rank: int, out: str) -> None:
    """``rank`` stops (SIGSTOP) inside the second sync; the other one writes its error, and the seconds that it took."""
    learner, engine, sync = start(folder, tensor=2, canary_prompts=0)
    sync.push(0)  # with time for the engine to start
    sync._lockstep._limit = 4.0 if engine is not None else 16.0
    pids = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    if dist.get_rank() == rank:
        gather = sync._source._inner._gather

        def stop(index):
            if index == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            return gather(index)

        sync._source._inner._gather = stop
    began = time.monotonic()
    try:
        sync.push(1)
    except Exception as error:
        assert engine is None or (engine.state == "dead" and engine.policy_version is None)
        Path(out).write_text(json.dumps([f"{type(error).__name__}: {error}", time.monotonic() - began]))
        os.kill(pids[rank], signal.SIGKILL)  # a stopped process would keep torchrun waiting
        raise
