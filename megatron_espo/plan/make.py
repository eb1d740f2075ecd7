"""The whole plan of a run, from its configuration and the model's ``config.json``."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import lcm
from typing import Any

import torch

from megatron_espo.config import Config
from megatron_espo.mcore.meta import BuiltRank, build_ranks
from megatron_espo.mcore.runtime import parallel_sizes
from megatron_espo.plan.engine import Engine, engine_problems, plan_engine
from megatron_espo.plan.memory import StageMemory, plan_memory
from megatron_espo.plan.parameters import StageParameters, count_parameters, total_parameters
from megatron_espo.plan.pipeline import Pipeline, plan_pipeline
from megatron_espo.plan.transfer import Links, Transfer, plan_transfer
from megatron_espo.rollout.server import engine_owners
from megatron_espo.weights.families import model_groups

GB = 10**9


@dataclass(frozen=True)
class Machine:
    """Where the run is to live.

    Attributes:
        gpu_memory: bytes of one GPU that may be used.
        links: speeds for the estimate of the sync.
        expected_tokens: mean tokens of a prompt with its response; None: half of ``rollout.max_response_tokens``.
        on_gpu: false for a run without GPUs (the plan's figures were compared with such runs).
        host_link: bytes a second and direction between a GPU and host memory.
    """

    gpu_memory: int
    links: Links
    expected_tokens: int | None = None
    on_gpu: bool = True
    host_link: float = 50e9


@dataclass(frozen=True)
class Plan:
    """What a run needs and moves; bytes and elements are exact unless an attribute's description says estimate.

    ``host_bytes`` is the memory of a node for what leaves its GPUs (``megatron.offload``), ``offload_s`` the estimate of a step's seconds for that.
    """

    model: str
    layout: dict[str, Any]
    world_size: int
    data_parallel_size: int
    gpu_memory: int
    total_parameters: int
    parameters: list[StageParameters]
    memory: list[StageMemory]
    pipeline: Pipeline
    engine: Engine
    transfer: Transfer
    host_bytes: int
    offload_s: float
    problems: list[str]

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def worst(self) -> StageMemory:
        """The stage that needs most."""
        return max(self.memory, key=lambda stage: stage.total)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists; bytes, seconds, elements."""
        data = asdict(self) | {"fits": self.fits}
        for stage, row in zip(self.memory, data["memory"], strict=True):
            row |= {"static": stage.static, "phases": stage.phases, "host": stage.host, "total": stage.total}
        data["transfer"]["seconds"] = self.transfer.seconds
        return data


@dataclass(frozen=True)
class Built:
    """What depends on layout and number of ranks alone."""

    ranks: list[BuiltRank]
    parameters: list[StageParameters]
    transfer: Transfer


class Builder:
    """Builds one model on one kind of machine, layout by layout; a layout is built once.

    Args:
        hf_config: the model's ``config.json``.
    """

    def __init__(self, hf_config: dict[str, Any], machine: Machine) -> None:
        self.hf_config, self.machine = hf_config, machine
        self.groups = model_groups(hf_config)
        self._built: dict[tuple, Built] = {}

    def __call__(self, config: Config, world_size: int) -> Built:
        sizes = parallel_sizes(config.megatron).values()
        dtypes = (config.model.dtype, config.rollout.dtype)
        key = (*sizes, *dtypes, config.optimizer.use_distributed_optimizer, self.transport(config), bool(config.rollout.hosts), world_size)
        if key not in self._built:
            ranks = list(build_ranks(config, self.hf_config, world_size))
            stage_ranks = world_size // config.megatron.pipeline_model_parallel_size
            links, transport = self.machine.links, self.transport(config)
            # How often the bytes go to another node; 0: the engine is on its owner's.
            # ``files`` writes them to the shared folder, and the engine's node reads them.
            copies = 0 if not config.rollout.hosts else 2 if transport == "files" else 1
            transfer = plan_transfer(ranks, self.groups, wire_bytes(config), transport, stage_ranks, links, copies)
            self._built[key] = Built(ranks, count_parameters(ranks, self.groups), transfer)
        return self._built[key]

    def engine(self, config: Config) -> Engine:
        """vLLM's share of a GPU."""
        rollout, transport = config.rollout, self.transport(config)
        has_own = rollout.hosts or rollout.visible_devices is not None or not self.machine.on_gpu
        shares_gpus = transport == "ipc" or (transport == "files" and not has_own)
        return plan_engine(config, self.hf_config, self.groups, wire_bytes(config), shares_gpus, self.machine.gpu_memory)

    def transport(self, config: Config) -> str:
        """What ``rollout.transport`` means there."""
        auto = "files"
        if self.machine.on_gpu:
            auto = "nccl" if config.rollout.hosts else "ipc"
        return auto if config.rollout.transport == "auto" else config.rollout.transport


def wire_bytes(config: Config) -> int:
    """Bytes of a weight in the engine."""
    dtype = config.model.dtype if config.rollout.dtype == "auto" else config.rollout.dtype
    return getattr(torch, dtype).itemsize


def smallest_world(config: Config) -> int:
    """The fewest ranks that the layout allows: one replica of the dense part and of the experts."""
    m = config.megatron
    expert_tp = m.expert_tensor_parallel_size or m.tensor_model_parallel_size
    dense = m.tensor_model_parallel_size * m.context_parallel_size
    return m.pipeline_model_parallel_size * lcm(dense, expert_tp * m.expert_model_parallel_size)


def make_plan(config: Config, build: Builder, gpus: int | None) -> Plan:
    """Build every stage of the run on the meta device and add up. Seconds; it replaces functions of torch as
    ``mcore.cpu.install`` does, so a process that plans does nothing else.

    Args:
        gpus: trainer ranks; None: the fewest that the layout allows.

    Raises:
        InputError: the layout fits neither the model nor the number of GPUs.
    """
    hf_config, machine, megatron = build.hf_config, build.machine, config.megatron
    config.validate_model(hf_config)
    world_size = gpus or smallest_world(config)
    data_parallel_size = config.validate_for(world_size)
    stage_ranks = world_size // megatron.pipeline_model_parallel_size
    built = build(config, world_size)
    pipeline = plan_pipeline(config, hf_config, data_parallel_size, machine.expected_tokens)
    engine = build.engine(config)
    hosts = {owner + i for owner in engine_owners(engine.number, world_size) for i in range(engine.gpus)} if engine.shares_gpus else set()
    memory = [
        plan_memory(
            rank,
            config,
            hf_config,
            build.groups,
            pipeline,
            on_gpu=machine.on_gpu,
            sync=built.transfer.peak_bytes + (0 if machine.on_gpu else built.transfer.file_bytes),
            engine=None if hosts.isdisjoint(range(rank.rank, rank.rank + stage_ranks)) else engine,
        )
        for rank in built.ranks
        if rank.rank % stage_ranks == 0
    ]
    leaves = max(stage.host for stage in memory)
    return Plan(
        model=config.model.path,
        layout=megatron.model_dump(),
        world_size=world_size,
        data_parallel_size=data_parallel_size,
        gpu_memory=machine.gpu_memory,
        total_parameters=total_parameters(build.groups),
        parameters=built.parameters,
        memory=memory,
        pipeline=pipeline,
        engine=engine,
        transfer=built.transfer,
        host_bytes=leaves * min(world_size, machine.links.gpus_per_node),
        offload_s=2 * leaves / machine.host_link,
        problems=[*_memory_problems(memory, machine.gpu_memory), *engine_problems(engine)],
    )


def _memory_problems(memory: list[StageMemory], gpu_memory: int) -> Iterator[str]:
    for stage in memory:
        if stage.total > gpu_memory:
            phase, (trainer, engine) = max(stage.phases.items(), key=lambda item: sum(item[1]))
            parts = f" (trainer {trainer / GB:.1f}, engine {engine / GB:.1f})" if engine else ""
            yield f"a GPU of stage {stage.stage} needs {stage.total / GB:.1f} GB during {phase}{parts}, it has {gpu_memory / GB:.1f} GB"
