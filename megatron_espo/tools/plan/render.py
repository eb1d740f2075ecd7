"""The plan as tables of at most 100 columns."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_espo.tools.plan.memory import GB
from megatron_espo.tools.plan.planner import Plan

WIDTH = 100
LAYOUT = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "EP": "expert_model_parallel_size",
}
MEMORY = (
    "stage", "weights", "grads", "main", "Adam", "in flight", "activ.", "work", "sync", "engine",
    "total",
)  # fmt: skip
TRANSFER = ("group", "stage", "tensors", "GB", "from each rank, MB", "ranks", "peak extra, GB")


def print_plan(plan: Plan, fixes: Sequence[str]) -> None:
    """Print the plan; the last line is the verdict."""
    console = Console(highlight=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    for part in _parts(plan):
        console.print(part)
    for label, lines in {"problem": plan.problems, "fix": fixes}.items():
        for line in lines:
            console.print(f"[bold]{label}:[/] {escape(line)}")
    worst = plan.worst
    if plan.fits:
        console.print(
            f"[bold green]fits[/]: at most {_gb(worst.total)} of {_gb(plan.gpu_memory)} GB on each "
            f"of {plan.world_size} GPUs (stage {worst.stage})"
        )
        return
    reason = "any one of the fixes above makes it fit"
    if not fixes:
        reason = "nor does it after the usual changes; it needs more GPUs or shorter sequences"
    console.print(f"[bold red]does not fit[/]: {reason}")


def _parts(plan: Plan) -> Iterator[Table | str]:
    in_phases = any(stage.sleeps or stage.offload for stage in plan.memory)
    yield _head(plan)
    rows = [(str(s.layers), f"{s.whole:,}", f"{s.per_gpu:,}") for s in plan.parameters]
    columns = ("stage", "layers", "of the model", "on each GPU, with padding")
    yield _stages("Parameters by pipeline stage", columns, rows)
    yield _memory(plan)
    if in_phases:
        yield from _phases(plan)
    yield _notes(plan, in_phases)
    yield _transfer(plan)
    yield _sync(plan)


def _gb(size: float) -> str:
    return f"{size / GB:.1f}"


def _head(plan: Plan) -> str:
    layout = plan.layout
    sizes = {short: layout[name] for short, name in LAYOUT.items() if (layout[name] or 1) > 1}
    sizes["DP"] = plan.data_parallel_size
    return (
        f"{plan.model}: {plan.total_parameters:,} parameters on {plan.world_size} GPUs "
        f"({', '.join(f'{short} {size}' for short, size in sizes.items())})\n"
        f"recomputation {layout['recompute_granularity'] or 'none'}, sequence parallel "
        f"{'on' if layout['sequence_parallel'] else 'off'}, "
        f"micro-batches of at most {plan.pipeline.tokens:,} tokens\n"
    )


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.pad_edge = False
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    return table


def _stages(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """One row for each range of stages with equal cells."""
    table = _table(title, columns)
    for cells, stages in groupby(enumerate(rows), key=lambda row: row[1]):
        among = [str(stage) for stage, _ in stages]
        table.add_row(among[0] if len(among) == 1 else f"{among[0]} - {among[-1]}", *cells)
    return table


def _memory(plan: Plan) -> Table:
    rows = []
    for s in plan.memory:
        static = map(_gb, (s.weights, s.gradients, s.main_weights, s.adam))
        moment = (s.activations, max(s.working, s.head), s.sync, s.engine, s.total)
        rows.append((*static, str(s.in_flight), *map(_gb, moment)))
    return _stages("Memory of one GPU, by pipeline stage (GB = 10^9 bytes)", MEMORY, rows)


def _phases(plan: Plan) -> Iterator[Table | str]:
    """Memory of each phase, where trainer or engine free some."""
    phases = list(plan.memory[0].phases)
    rows = [
        (*(_gb(sum(stage.phases[phase])) for phase in phases), _gb(stage.host))
        for stage in plan.memory
    ]
    columns = ("stage", *phases, "on the host")
    yield _stages("Trainer and engine in each phase of a step", columns, rows)
    yield (
        f"The host keeps {_gb(plan.host_bytes)} GB a node for what leaves its GPUs; out and back "
        f"takes {plan.offload_s:.2f} s a step (--host-gbps)\n"
    )


def _notes(plan: Plan, in_phases: bool) -> str:
    pipeline, engine = plan.pipeline, plan.engine
    where = "other machines' GPUs" if engine.on_hosts else "GPUs of their own"
    if engine.shares_gpus:
        where = "the trainer's GPUs"
    total = "weights + grads + main (float32 copy) + Adam + max(activ. + work, sync) + engine"
    return (
        f"total = {'the worst phase' if in_phases else total}\n"
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


def _transfer(plan: Plan) -> Table:
    groups = plan.transfer.groups
    tensors = sum(group.tensors for group in groups)
    table = _table(f"Weights into the engine: {tensors:,} tensors", TRANSFER)
    cells = [
        (str(g.stage), str(g.tensors), f"{g.gathered_bytes / GB:.2f}",
         f"{g.shard_bytes / 1e6:,.1f}", str(g.gather_ranks), f"{g.peak_bytes / GB:.2f}")
        for g in groups
    ]  # fmt: skip
    for row, equal in groupby(zip(cells, groups, strict=True), key=lambda pair: pair[0]):
        names = [group.name for _, group in equal]
        last = names[-1].rsplit(".", 1)[-1]
        table.add_row(names[0] if len(names) == 1 else f"{names[0]} … {last}", *row)
    return table


def _sync(plan: Plan) -> str:
    t = plan.transfer
    network, node = max(t.received)
    return (
        f"Sync (estimate): {t.seconds:.2f} s for {_gb(t.bytes)} GB = across stages "
        f"{t.pipeline_s:.2f} + gathers {t.gather_s:.2f} - overlap {t.overlap_s:.2f}\n"
        f"+ into the engine {t.engine_s:.2f}. Each part: bytes / link; a batch is gathered while "
        "the next one is sent.\n"
        f"A GPU receives {_gb(network)} GB over the network and {_gb(node)} GB inside its node.\n"
        f"The engine's GPUs get them from {t.sender}.\n"
    )
