"""The plan as tables of at most 100 columns."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from textwrap import fill

from megatron_espo.distributed.runtime import PARALLEL_SIZES
from megatron_espo.tools.plan.memory import GB
from megatron_espo.tools.plan.planner import Plan

WIDTH = 100
LAYOUT = dict(zip(("TP", "PP", "VPP", "CP", "EP", "ETP"), PARALLEL_SIZES, strict=True))
MEMORY = (
    "stage", "weights", "grads", "main", "Adam", "in flight", "activ.", "work", "sync", "engine",
    "total",
)  # fmt: skip


def render(plan: Plan, fix: str | None) -> str:
    """The plan as text; the last line is the verdict."""
    worst, stages = plan.worst, plan.memory
    memory = [
        (
            s.stage, *map(_gb, (s.weights, s.gradients, s.main_weights, s.adam)), s.in_flight,
            *map(_gb, (s.activations, max(s.working, s.head), s.sync, s.engine, s.total)),
        )
        for s in stages
    ]  # fmt: skip
    parts = [
        _head(plan),
        _table("Memory of one GPU, by pipeline stage (GB = 10^9 bytes)", MEMORY, memory),
        *_phases(plan),
        _notes(plan),
        _sync(plan),
        *(f"problem: {problem}" for problem in plan.problems),
    ]
    if plan.fits:
        parts.append(
            f"fits: at most {_gb(worst.total)} of {_gb(plan.gpu_memory)} GB on each of "
            f"{plan.world_size} GPUs (stage {worst.stage})"
        )
    elif fix:
        parts += [f"fix: {fix}", "does not fit; with the fix above it does"]
    else:
        parts.append("does not fit: it needs more GPUs or shorter sequences")
    lines = "\n".join(parts).split("\n")
    return "\n".join(line if len(line) <= WIDTH else fill(line, WIDTH) for line in lines)


def _gb(size: float) -> str:
    return f"{size / GB:.1f}"


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table. Neighbours that differ only in the first column are one row."""
    lines = [tuple(columns)]
    for cells, same in groupby(rows, key=lambda row: row[1:]):
        names = [str(name) for name, *_ in same]
        name = names[0] if len(names) == 1 else f"{names[0]} - {names[-1].rpartition('.')[2]}"
        lines.append((name, *map(str, cells)))
    first, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    text = [
        "   ".join([name.ljust(first), *map(str.rjust, cells, widths)]) for name, *cells in lines
    ]
    return "\n".join([title, text[0], "-" * len(text[0]), *text[1:], ""])


def _head(plan: Plan) -> str:
    layout = plan.layout
    sizes = {short: layout[name] for short, name in LAYOUT.items() if (layout[name] or 1) > 1}
    sizes["DP"] = plan.data_parallel_size
    each = max(stage.parameters for stage in plan.memory)
    return (
        f"{plan.model}: {plan.total_parameters:,} parameters on {plan.world_size} GPUs "
        f"({', '.join(f'{short} {size}' for short, size in sizes.items())})\n"
        f"at most {each:,} parameters on each GPU\n"
        f"recomputation {layout['recompute_granularity'] or 'none'}, sequence parallel "
        f"{'on' if layout['sequence_parallel'] else 'off'}, "
        f"micro-batches of at most {plan.pipeline.tokens:,} tokens\n"
    )


def _phases(plan: Plan) -> Iterator[str]:
    """Memory of each phase, where trainer or engine free some."""
    if not plan.in_phases:
        return
    phases = list(plan.memory[0].phases)
    rows = [
        (stage.stage, *(_gb(sum(stage.phases[phase])) for phase in phases), _gb(stage.host))
        for stage in plan.memory
    ]
    columns = ("stage", *phases, "on the host")
    yield _table("Trainer and engine in each phase of a step", columns, rows)
    yield (
        f"The host keeps {_gb(plan.host_bytes)} GB a node for what leaves its GPUs; out and back "
        f"takes {plan.offload_s:.2f} s a step (--host-gbps)\n"
    )


def _notes(plan: Plan) -> str:
    pipeline, engine = plan.pipeline, plan.engine
    where = "other machines' GPUs" if engine.on_hosts else "GPUs of their own"
    if engine.shares_gpus:
        where = "the trainer's GPUs"
    total = "weights + grads + main (float32 copy) + Adam + max(activ. + work, sync) + engine"
    return (
        f"total = {'the worst phase' if plan.in_phases else total}\n"
        "activ.: of all micro-batches in flight; work: for the moment, in one chunk's backward or "
        "the head\n\n"
        f"vLLM: {engine.number} x {engine.gpus} of {where}, {_gb(engine.budget_bytes)} GB of each: "
        f"weights {_gb(engine.weight_bytes)} GB, the rest\n"
        f"caches {engine.kv_tokens:,} tokens of {engine.kv_bytes_per_token:,} bytes an engine, or "
        f"{engine.kv_tokens / engine.max_model_len:.1f} sequences of {engine.max_model_len:,} "
        "tokens\n\n"
        f"Pipeline: {pipeline.micro_batches} micro-batches in a step if a prompt with its response "
        f"has {pipeline.expected_tokens:,} tokens\n(--expected-tokens); a stage idles "
        f"{pipeline.bubble:.1%} of the step\n"
    )


def _sync(plan: Plan) -> str:
    t = plan.transfer
    network, node = max(t.received)
    overlap = t.gather_s + t.pipeline_s + t.engine_s - t.seconds
    return (
        f"Sync (estimate): {t.seconds:.2f} s for {_gb(t.bytes)} GB = across stages "
        f"{t.pipeline_s:.2f} + gathers {t.gather_s:.2f} - overlap {overlap:.2f}\n"
        f"+ into the engine {t.engine_s:.2f}. Each part: bytes / link; a batch is gathered while "
        "the next one is sent.\n"
        f"A GPU receives {_gb(network)} GB over the network and {_gb(node)} GB inside its node.\n"
        f"The engine's GPUs get them from {t.sender}.\n"
    )
