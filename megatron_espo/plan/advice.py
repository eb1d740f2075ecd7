"""Which setting makes a run fit: each candidate is planned, none is guessed."""

import json
from collections.abc import Iterator
from typing import Any

from megatron_espo.config import Config
from megatron_espo.plan.engine import engine_problems
from megatron_espo.plan.make import GB, Builder, Plan, make_plan

Changes = dict[str, Any]
MOST_FIXES = 3
LEAST_SHARE = 0.1  # of a GPU for the engine
LEAST_TOKENS = 1024  # in a micro-batch
RECOMPUTE = {
    "megatron.recompute_granularity": "full",
    "megatron.recompute_method": "uniform",
    "megatron.recompute_num_layers": 1,
}
TURNS = {"rollout.sleep": True, "megatron.offload": ["optimizer", "gradients"]}


def find_fixes(config: Config, build: Builder, plan: Plan, gpus: int | None) -> list[str]:
    """Up to three changes that each make the run of ``plan`` fit, those that cost least first.

    Single settings are tried first, then each of them together with all that saves memory in the layout as it is.
    """
    node = build.machine.links.gpus_per_node
    savings = _savings(config, plan)
    if plan.engine.kv_tokens < plan.engine.max_model_len and plan.engine.gpus < node:
        savings.append({"rollout.tensor_parallel_size": node})
    together = {key: value for changes in savings for key, value in changes.items()}
    singles = [*savings, *_shares(config), *_smaller_micro_batches(config), *_layouts(config, node, gpus)]
    for candidates in (singles, [together, *({**together, **changes} for changes in singles)]):
        found: dict[str, str] = {}
        for changes in candidates:
            knob = " ".join(changes)
            changed = None if knob in found else _plan(config, build, changes, gpus)
            if changed and changed.fits:
                settings = " ".join(f"{key}={json.dumps(value, separators=(',', ':'))}".replace('"', "") for key, value in changes.items())
                found[knob] = f"{settings}: {changed.worst.total / GB:.1f} GB on each of {changed.world_size} GPUs"
            if len(found) == MOST_FIXES:
                break
        if found:
            return list(found.values())
    return []


def _savings(config: Config, plan: Plan) -> list[Changes]:
    """What saves memory in the layout as it is."""
    m = config.megatron
    savings: list[Changes] = []
    if not config.optimizer.use_distributed_optimizer:
        savings.append({"optimizer.use_distributed_optimizer": True})
    if m.tensor_model_parallel_size > 1 and not m.sequence_parallel:
        savings.append({"megatron.sequence_parallel": True})
    if plan.engine.shares_gpus and not config.rollout.sleep and not config.rollout.max_staleness:
        savings.append(TURNS)
    if m.recompute_granularity != "full":
        savings.append(RECOMPUTE)
    return savings


def _shares(config: Config) -> Iterator[Changes]:
    share = config.rollout.gpu_memory_utilization
    while (share := round(share - 0.1, 2)) >= LEAST_SHARE:
        yield {"rollout.gpu_memory_utilization": share}


def _smaller_micro_batches(config: Config) -> Iterator[Changes]:
    if config.megatron.head_memory_mib is None:
        yield {"megatron.head_memory_mib": 1024}
    tokens = config.megatron.max_tokens_per_micro_batch
    while (tokens := tokens // 2) >= max(LEAST_TOKENS, config.rollout.max_response_tokens):
        yield {"megatron.max_tokens_per_micro_batch": tokens}


def _layouts(config: Config, node: int, gpus: int | None) -> Iterator[Changes]:
    """More GPUs for each copy of the model, or for the optimizer's states."""
    m = config.megatron
    if m.virtual_pipeline_model_parallel_size:
        yield {"megatron.virtual_pipeline_model_parallel_size": None}
    tp = m.tensor_model_parallel_size
    while (tp := tp * 2) <= node:
        yield {"megatron.tensor_model_parallel_size": tp, "megatron.sequence_parallel": True}
    for times in (2, 4, 8):
        yield {"megatron.pipeline_model_parallel_size": m.pipeline_model_parallel_size * times}
    for times in (2, 4) if gpus else ():
        yield {"--gpus": gpus * times}


def _plan(config: Config, build: Builder, changes: Changes, gpus: int | None) -> Plan | None:
    """The plan with ``changes``; None where the model, the number of GPUs or the engine does not allow them."""
    changes = dict(changes)
    gpus = changes.pop("--gpus", gpus)
    tree = config.model_dump()
    for key, value in changes.items():
        section, name = key.split(".")
        tree[section][name] = value
    try:
        changed = Config.model_validate(tree)
        # The engine needs no build: told first, it spares one.
        return None if any(engine_problems(build.engine(changed))) else make_plan(changed, build, gpus)
    except ValueError:  # an InputError, or pydantic's
        return None
