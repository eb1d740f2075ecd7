"""The plan as tables that fit 100 columns."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_espo.plan.make import GB, Plan

WIDTH = 100


def print_plan(plan: Plan, fixes: Sequence[str]) -> None:
    """Print everything; the last line is the verdict."""
    console = Console(highlight=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    for part in (_head(plan), _parameters(plan), _memory(plan), *_turns(plan), _notes(plan), _transfer(plan), _sync(plan)):
        console.print(part)
    for problem in plan.problems:
        console.print(f"[bold]problem:[/] {problem}")
    for fix in fixes:
        console.print(f"[bold]fix:[/] {fix}")
    worst = plan.worst
    if plan.fits:
        console.print(
            f"[bold green]fits[/]: at most {_gb(worst.total)} of {_gb(plan.gpu_memory)} GB on each of "
            f"{plan.world_size} GPUs (stage {worst.stage})"
        )
    elif fixes:
        console.print("[bold red]does not fit[/]: any one of the fixes above makes it fit")
    else:
        console.print("[bold red]does not fit[/]: nor does it after the usual changes; it needs more GPUs or shorter sequences")


def _gb(size: float) -> str:
    return f"{size / GB:.1f}"


def _head(plan: Plan) -> str:
    layout = plan.layout
    names = {"TP": "tensor_model", "PP": "pipeline_model", "VPP": "virtual_pipeline_model", "CP": "context", "EP": "expert_model"}
    sizes = {short: layout[f"{name}_parallel_size"] for short, name in names.items()}
    sizes = {short: size for short, size in sizes.items() if size and size > 1} | {"DP": plan.data_parallel_size}
    return (
        f"{plan.model}: {plan.total_parameters:,} parameters on {plan.world_size} GPUs "
        f"({', '.join(f'{short} {size}' for short, size in sizes.items())})\n"
        f"recomputation {layout['recompute_granularity'] or 'none'}, sequence parallel "
        f"{'on' if layout['sequence_parallel'] else 'off'}, micro-batches of at most {plan.pipeline.tokens:,} tokens\n"
    )


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, title_style="bold")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    return table


def _add_stages(table: Table, rows: Iterable[Sequence[str]]) -> Table:
    """One row for each run of stages with equal cells."""
    for cells, stages in groupby(enumerate(rows), key=lambda row: row[1]):
        among = [str(stage) for stage, _ in stages]
        table.add_row(among[0] if len(among) == 1 else f"{among[0]} - {among[-1]}", *cells)
    return table


def _parameters(plan: Plan) -> Table:
    table = _table("Parameters by pipeline stage", ("stage", "layers", "of the model", "on each GPU, with padding"))
    return _add_stages(table, [(str(s.layers), f"{s.whole:,}", f"{s.per_gpu:,}") for s in plan.parameters])


def _memory(plan: Plan) -> Table:
    columns = ("stage", "weights", "grads", "main", "Adam", "in flight", "activ.", "work", "sync", "engine", "total")
    rows = []
    for stage in plan.memory:
        static = map(_gb, (stage.weights, stage.gradients, stage.main_weights, stage.adam))
        moment = map(_gb, (stage.activations, max(stage.working, stage.head), stage.sync, stage.engine, stage.total))
        rows.append((*static, str(stage.in_flight), *moment))
    return _add_stages(_table("Memory of one GPU, by pipeline stage (GB = 10^9 bytes)", columns), rows)


def _takes_turns(plan: Plan) -> bool:
    return any(stage.sleeps or stage.offload for stage in plan.memory)


def _turns(plan: Plan) -> Iterable[Table | str]:
    """What of it is there at the same time, where not all is."""
    if not _takes_turns(plan):
        return
    phases = list(plan.memory[0].phases)
    rows = [(*(_gb(sum(stage.phases[phase])) for phase in phases), _gb(stage.host)) for stage in plan.memory]
    yield _add_stages(_table("Trainer and engine in each phase of a step", ("stage", *phases, "on the host")), rows)
    yield (
        f"The host keeps {_gb(plan.host_bytes)} GB a node for what leaves its GPUs; out and back takes {plan.offload_s:.2f} s a step "
        "(--host-gbps)\n"
    )


def _notes(plan: Plan) -> str:
    pipeline, engine = plan.pipeline, plan.engine
    where = "the trainer's GPUs" if engine.shares_gpus else "other machines' GPUs" if engine.on_hosts else "GPUs of their own"
    total = "the worst phase" if _takes_turns(plan) else "weights + grads + main (float32 copy) + Adam + max(activ. + work, sync) + engine"
    return (
        f"total = {total}\n"
        "activ.: of all micro-batches in flight; work: for the moment, in one chunk's backward or the head\n\n"
        f"vLLM: {engine.number} x {engine.gpus} of {where}, {_gb(engine.budget_bytes)} GB of each: weights {_gb(engine.weight_bytes)} GB, the rest\n"
        f"caches {engine.kv_tokens:,} tokens of {engine.kv_bytes_per_token:,} bytes an engine, or "
        f"{engine.kv_tokens / engine.max_model_len:.1f} sequences of {engine.max_model_len:,} tokens\n\n"
        f"Pipeline: {pipeline.micro_batches} micro-batches in a step if a prompt with its response has "
        f"{pipeline.expected_tokens:,} tokens\n(--expected-tokens); a stage idles {pipeline.bubble:.1%} of the step\n"
    )


def _transfer(plan: Plan) -> Table:
    columns = ("group", "stage", "tensors", "GB", "from each rank, MB", "ranks", "peak extra, GB")
    table = _table(f"Weights into the engine: {sum(group.tensors for group in plan.transfer.groups):,} tensors", columns)
    for cells, groups in groupby(
        plan.transfer.groups,
        key=lambda g: (
            str(g.stage), str(g.tensors), f"{g.gathered_bytes / GB:.2f}", f"{g.shard_bytes / 1e6:,.1f}", str(g.gather_ranks), f"{g.peak_bytes / GB:.2f}",
        ),
    ):  # fmt: skip
        names = [group.name for group in groups]
        table.add_row(names[0] if len(names) == 1 else f"{names[0]} … {names[-1].rsplit('.', 1)[-1]}", *cells)
    return table


def _sync(plan: Plan) -> str:
    t = plan.transfer
    return (
        f"Sync (estimate): {t.seconds:.2f} s for {_gb(t.bytes)} GB = gathers {t.gather_s:.2f} + across stages "
        f"{t.pipeline_s:.2f} + into the engine {t.engine_s:.2f}.\n"
        f"The engine's GPUs get them from {t.sender}.\n"
        "Each part: bytes / link, one after the other; a gather over n ranks moves (n - 1) / n of its bytes.\n"
    )
