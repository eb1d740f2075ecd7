"""The whole plan of a run, and settings that make a run fit that does not."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import lcm, prod
from statistics import fmean
from typing import Any

import torch

from megatron_espo.config import Config
from megatron_espo.config.checks import check_model, check_world_size
from megatron_espo.distributed.runtime import parallel_sizes
from megatron_espo.megatron.meta import BuiltRank, build_ranks
from megatron_espo.models.spec import ModelSpec
from megatron_espo.rollout.server import engine_owners
from megatron_espo.rollout.transport import needs_all_replicas
from megatron_espo.tools.plan.memory import (
    GB,
    Engine,
    Pipeline,
    StageMemory,
    plan_engine,
    plan_memory,
    plan_pipeline,
)
from megatron_espo.tools.plan.transfer import Machine, Transfer, plan_transfer, replica_ranks

Changes = dict[str, Any]
RECOMPUTE = {
    "megatron.recompute_granularity": "full",
    "megatron.recompute_method": "uniform",
    "megatron.recompute_num_layers": 1,
}
OFFLOAD = {"rollout.sleep": True, "megatron.offload": ["optimizer", "gradients"]}


@dataclass(frozen=True)
class Plan:
    """What a run needs and transfers, in bytes, elements and seconds.

    ``in_phases``: trainer or engine free memory in some phases of a step. ``host_bytes`` is the
    memory of a node for what ``megatron.offload`` moves there, ``offload_s`` the estimated seconds
    that a step spends on moving it.
    """

    model: str
    layout: dict[str, Any]
    world_size: int
    data_parallel_size: int
    gpu_memory: int
    total_parameters: int
    memory: list[StageMemory]
    pipeline: Pipeline
    engine: Engine
    transfer: Transfer
    in_phases: bool
    host_bytes: int
    offload_s: float
    problems: list[str]

    @property
    def fits(self) -> bool:
        """Whether the run fits the GPUs."""
        return not self.problems

    @property
    def worst(self) -> StageMemory:
        """The stage that needs most memory."""
        return max(self.memory, key=lambda stage: stage.total)

    @property
    def excess(self) -> tuple[int, float]:
        """Larger for a run that is further from fitting."""
        return len(self.problems), fmean(stage.total for stage in self.memory)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists, derived values included."""
        return asdict(self) | {"fits": self.fits}


# The part of a plan that depends only on the layout and the number of ranks.
Built = tuple[list[BuiltRank], Transfer]


class Builder:
    """Builds one model for one kind of machine; builds each layout once.

    Args:
        spec: the model.
    """

    def __init__(self, spec: ModelSpec, machine: Machine) -> None:
        self.spec, self.machine = spec, machine
        self._built: dict[tuple, Built] = {}

    def __call__(self, config: Config, world_size: int) -> Built:
        """Build, or return what was built for an equal layout."""
        rollout, transport = config.rollout, self._transport(config)
        sizes = tuple(parallel_sizes(config.megatron).values())
        sharded = config.optimizer.use_distributed_optimizer
        sends = transport, bool(rollout.hosts), needs_all_replicas(transport, rollout.engines)
        key = (sizes, config.model.dtype, sharded, sends, world_size)
        if key not in self._built:
            ranks = list(build_ranks(config, self.spec, world_size))
            transfer = plan_transfer(
                ranks, config, self.spec.groups, transport, world_size, self.machine
            )
            self._built[key] = ranks, transfer
        return self._built[key]

    def engine(self, config: Config) -> Engine:
        """vLLM's memory on one of its GPUs."""
        rollout, transport = config.rollout, self._transport(config)
        has_own = rollout.hosts or rollout.visible_devices is not None or not self.machine.on_gpu
        shares = transport == "ipc" or (transport == "files" and not has_own)
        itemsize = getattr(torch, config.model.dtype).itemsize
        return plan_engine(config, self.spec, itemsize, shares, self.machine.gpu_memory)

    def _transport(self, config: Config) -> str:
        if config.rollout.transport != "auto":
            return config.rollout.transport
        if not self.machine.on_gpu:
            return "files"
        return "nccl" if config.rollout.hosts else "ipc"


def _smallest_world(config: Config) -> int:
    """The fewest ranks of the layout."""
    m = config.megatron
    ranks = m.tensor_model_parallel_size * m.context_parallel_size
    return m.pipeline_model_parallel_size * lcm(ranks, replica_ranks(config))


def make_plan(config: Config, build: Builder, gpus: int | None) -> Plan:
    """Build every stage of the run on the meta device and add up. Takes seconds.

    It patches torch's functions (``distributed.cpu.install``), so the process must do nothing else.

    Args:
        gpus: trainer ranks; None: the fewest that the layout allows.

    Raises:
        InputError: the layout fits neither the model nor the number of GPUs.
    """
    spec, machine, megatron = build.spec, build.machine, config.megatron
    check_model(config, spec)
    world_size = gpus or _smallest_world(config)
    data_parallel_size = check_world_size(config, world_size)
    stage_ranks = world_size // megatron.pipeline_model_parallel_size
    ranks, transfer = build(config, world_size)
    engine = build.engine(config)
    pipeline = plan_pipeline(config, spec, data_parallel_size, machine.expected_tokens)
    owners = engine_owners(engine.number, world_size) if engine.shares_gpus else ()
    shared = {owner + i for owner in owners for i in range(engine.gpus)}
    sync = transfer.peak_bytes + (0 if machine.on_gpu else transfer.file_bytes)
    memory = []
    for rank in ranks:
        if rank.rank % stage_ranks == 0:
            alone = shared.isdisjoint(range(rank.rank, rank.rank + stage_ranks))
            own = None if alone else engine
            memory.append(plan_memory(rank, config, spec, pipeline, machine.on_gpu, sync, own))
    offloaded = max(stage.host for stage in memory)
    return Plan(
        model=config.model.path,
        layout=megatron.model_dump(),
        world_size=world_size,
        data_parallel_size=data_parallel_size,
        gpu_memory=machine.gpu_memory,
        total_parameters=sum(map(prod, spec.tensor_shapes.values())),
        memory=memory,
        pipeline=pipeline,
        engine=engine,
        transfer=transfer,
        in_phases=config.rollout.sleep or bool(megatron.offload),
        host_bytes=offloaded * min(world_size, machine.gpus_per_node),
        offload_s=2 * offloaded / machine.host_link,
        problems=[*_memory_problems(memory, machine.gpu_memory), *engine.problems()],
    )


def _memory_problems(memory: list[StageMemory], gpu_memory: int) -> Iterator[str]:
    for stage in memory:
        if stage.total > gpu_memory:
            phase, (trainer, engine) = max(stage.phases.items(), key=lambda item: sum(item[1]))
            parts = f" (trainer {trainer / GB:.1f}, engine {engine / GB:.1f})" if engine else ""
            yield (
                f"a GPU of stage {stage.stage} needs {stage.total / GB:.1f} GB during "
                f"{phase}{parts}, it has {gpu_memory / GB:.1f} GB"
            )


def find_fix(config: Config, build: Builder, plan: Plan, gpus: int | None) -> str | None:
    """Changes that make the run of ``plan`` fit: those of the usual ones that help, one after the
    other, until it fits.
    """
    best, changes = plan, Changes()
    for change in _usual_changes(config, plan, build.machine.gpus_per_node, gpus):
        changed = _changed_plan(config, build, changes | change, gpus)
        if changed and changed.excess < best.excess:
            best, changes = changed, changes | change
        if best.fits:
            memory = f"{best.worst.total / GB:.1f} GB on each of {best.world_size} GPUs"
            return f"{_overrides(changes)}: {memory}"
    return None


def _overrides(changes: Changes) -> str:
    """The changes as arguments of the command line."""
    text = (f"{k}={json.dumps(v, separators=(',', ':'))}" for k, v in changes.items())
    return " ".join(text).replace('"', "")


def _usual_changes(config: Config, plan: Plan, node: int, gpus: int | None) -> Iterator[Changes]:
    """Changes that save memory: in the same layout, then with more GPUs for each replica of the
    model.
    """
    m, share = config.megatron, config.rollout.gpu_memory_utilization
    yield {"rollout.tensor_parallel_size": node}
    yield {"optimizer.use_distributed_optimizer": True}
    yield {"megatron.sequence_parallel": True}
    if plan.engine.shares_gpus and not config.rollout.max_staleness:
        yield OFFLOAD
    yield RECOMPUTE
    while (share := round(share - 0.1, 2)) >= 0.1:
        yield {"rollout.gpu_memory_utilization": share}
    if m.head_memory_mib is None:
        yield {"megatron.head_memory_mib": 1024}
    tokens = m.max_tokens_per_micro_batch
    while (tokens := tokens // 2) >= max(1024, config.rollout.max_response_tokens):
        yield {"megatron.max_tokens_per_micro_batch": tokens}
    tp = m.tensor_model_parallel_size
    while (tp := tp * 2) <= node:
        yield {"megatron.tensor_model_parallel_size": tp, "megatron.sequence_parallel": True}
    for times in (2, 4, 8):
        yield {"megatron.pipeline_model_parallel_size": m.pipeline_model_parallel_size * times}
    if gpus:
        yield {"--gpus": gpus * 2}


def _changed_plan(
    config: Config, build: Builder, changes: Changes, gpus: int | None
) -> Plan | None:
    """The plan with ``changes``; None where the model, the GPUs or the engine do not allow them."""
    tree = config.model_dump()
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        if section:
            tree[section][name] = value
    try:
        return make_plan(Config.model_validate(tree), build, changes.get("--gpus", gpus))
    except ValueError:  # an InputError, or pydantic's
        return None
