"""The whole plan of a run, and settings that make a run fit that does not."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm, prod
from statistics import fmean
from typing import Any

from megatron_espo.config import Config, load_config
from megatron_espo.config.checks import check_model, check_world_size
from megatron_espo.distributed.runtime import parallel_sizes
from megatron_espo.errors import InputError
from megatron_espo.megatron.meta import BuiltRank, build_ranks
from megatron_espo.models.spec import ModelSpec
from megatron_espo.rollout.server import engine_owners
from megatron_espo.tools.plan.memory import (
    GB,
    Engine,
    Pipeline,
    StageMemory,
    largest_micro_batch,
    plan_engine,
    plan_memory,
    plan_pipeline,
)
from megatron_espo.tools.plan.transfer import Machine, Transfer, plan_transfer, replica_ranks

# Settings, with values as on the command line.
Changes = dict[str, str]
RECOMPUTE = {
    "megatron.recompute_granularity": "full",
    "megatron.recompute_method": "uniform",
    "megatron.recompute_num_layers": "1",
}
OFFLOAD = {"rollout.sleep": "true", "megatron.offload": "[optimizer,gradients]"}


@dataclass(frozen=True)
class Plan:
    """What a run needs and transfers, in bytes, elements and seconds.

    ``host_bytes`` is the host memory of a node for offloaded parts and the reference policy,
    ``offload_s`` the estimated seconds that a step moves them. A run without ``problems`` fits.
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
    host_bytes: int
    offload_s: float
    problems: list[str]

    @property
    def worst(self) -> StageMemory:
        """The stage that needs most memory."""
        return max(self.memory, key=lambda stage: stage.total)

    @property
    def excess(self) -> tuple[int, float]:
        """Larger for a run that is further from fitting."""
        return len(self.problems), fmean(stage.total for stage in self.memory)


class Builder:
    """Builds the ranks of one model; each layout once, because it takes seconds."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self._built: dict[tuple, list[BuiltRank]] = {}

    def __call__(self, config: Config, world_size: int) -> list[BuiltRank]:
        """Return what :func:`build_ranks` yields."""
        sizes = tuple(parallel_sizes(config.megatron).values())
        sharded = config.optimizer.use_distributed_optimizer
        key = (*sizes, config.model.dtype, sharded, world_size)
        if key not in self._built:
            self._built[key] = list(build_ranks(config, self.spec, world_size))
        return self._built[key]


def make_plan(config: Config, build: Builder, machine: Machine, gpus: int | None) -> Plan:
    """Build every stage of the run on the meta device and add up. Takes seconds.

    It patches torch's functions (``distributed.cpu.install``), so the process must do nothing else.

    Args:
        gpus: trainer ranks; None: the fewest that the layout allows.

    Raises:
        InputError: the layout fits neither the model nor the number of GPUs.
    """
    spec, megatron, rollout = build.spec, config.megatron, config.rollout
    check_model(config, spec)
    stages = megatron.pipeline_model_parallel_size
    model_ranks = megatron.tensor_model_parallel_size * megatron.context_parallel_size
    world_size = gpus or stages * lcm(model_ranks, replica_ranks(config))
    data_parallel_size = check_world_size(config, world_size)
    own_gpus = bool(rollout.hosts) or rollout.visible_devices is not None
    transport = rollout.transport
    if transport == "auto":
        transport = "nccl" if own_gpus else "ipc"
    shares_gpus = transport == "ipc" or (transport == "files" and not own_gpus)
    ranks = build(config, world_size)
    transfer = plan_transfer(ranks, config, spec.groups, transport, world_size, machine)
    engine = plan_engine(config, spec, shares_gpus, machine.gpu_memory)
    pipeline = plan_pipeline(config, spec, data_parallel_size, machine.expected_tokens)
    owners = engine_owners(rollout.engines, world_size) if shares_gpus else ()
    shared = {owner + i for owner in owners for i in range(engine.gpus)}
    stage_ranks, memory = world_size // stages, []
    for rank in ranks:
        if rank.rank % stage_ranks == 0:
            alone = shared.isdisjoint(range(rank.rank, rank.rank + stage_ranks))
            own = None if alone else engine
            memory.append(plan_memory(rank, config, spec, pipeline, transfer.peak_bytes, own))
    # The reference policy changes places with the model's weights twice a step.
    swapped = 2 if config.algorithm.kl_coef else 0
    moved = max(2 * stage.host + swapped * stage.weights for stage in memory)
    too_large = (
        f"a GPU of stage {stage.stage} needs {stage.total / GB:.1f} GB, it has "
        f"{machine.gpu_memory / GB:.1f} GB"
        for stage in memory
        if stage.total > machine.gpu_memory
    )
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
        host_bytes=max(stage.host for stage in memory) * min(world_size, machine.gpus_per_node),
        offload_s=moved / machine.host_link,
        problems=[*too_large, *engine.problems()],
    )


def find_fix(args: Any, build: Builder, machine: Machine, plan: Plan) -> str | None:
    """Changes that make the run of ``plan`` fit: those of the usual ones that help, one after the
    other, until it fits.

    Args:
        args: of the command line: ``config``, ``overrides`` and ``gpus``.
    """
    config, best, changes = load_config(args.config, args.overrides), plan, Changes()
    for change in _usual_changes(config, plan, machine.gpus_per_node, args.gpus):
        tried = changes | change
        overrides = [f"{key}={value}" for key, value in tried.items() if key != "--gpus"]
        gpus = int(tried["--gpus"]) if "--gpus" in tried else args.gpus
        try:
            config = load_config(args.config, [*args.overrides, *overrides])
            changed = make_plan(config, build, machine, gpus)
        except InputError:  # the model, the GPUs or the engine do not allow it
            continue
        if changed.excess < best.excess:
            best, changes = changed, tried
        if not best.problems:
            text = " ".join(f"{key}={value}" for key, value in changes.items())
            return f"{text}: {best.worst.total / GB:.1f} GB on each of {best.world_size} GPUs"
    return None


def _usual_changes(config: Config, plan: Plan, node: int, gpus: int | None) -> Iterator[Changes]:
    """Changes that save memory: in the same layout, then with more GPUs for each replica of the
    model.
    """
    m, share = config.megatron, config.rollout.gpu_memory_utilization
    yield {"rollout.tensor_parallel_size": str(node)}
    yield {"optimizer.use_distributed_optimizer": "true"}
    yield {"megatron.sequence_parallel": "true"}
    if plan.engine.shares_gpus and not config.rollout.max_staleness:
        yield OFFLOAD
    yield RECOMPUTE
    while (share := round(share - 0.1, 2)) >= 0.1:
        yield {"rollout.gpu_memory_utilization": str(share)}
    if m.head_memory_mib is None:
        yield {"megatron.head_memory_mib": "1024"}
    tokens = m.max_tokens_per_micro_batch
    while (tokens := tokens // 2) >= largest_micro_batch(1024, config.rollout):
        yield {"megatron.max_tokens_per_micro_batch": str(tokens)}
    tp = m.tensor_model_parallel_size
    while (tp := tp * 2) <= node:
        yield {"megatron.tensor_model_parallel_size": str(tp), "megatron.sequence_parallel": "true"}
    for times in (2, 4, 8):
        stages = m.pipeline_model_parallel_size * times
        yield {"megatron.pipeline_model_parallel_size": str(stages)}
    if gpus:
        yield {"--gpus": str(gpus * 2)}
