"""The plan as text."""

from collections.abc import Iterator

from megatron_espo.distributed.runtime import PARALLEL_SIZES
from megatron_espo.tools.plan.memory import GB
from megatron_espo.tools.plan.planner import Plan

LAYOUT = dict(zip(("TP", "PP", "VPP", "CP", "EP", "ETP"), PARALLEL_SIZES, strict=True))
COLUMNS = "stage weights grads main Adam chunks activ. work sync engine total".split()


def render(plan: Plan, fix: str | None) -> str:
    """The plan as text with tables of at most 100 columns; the last line is the verdict."""
    lines = [*_sizes(plan), *_memory(plan), *_estimates(plan)]
    lines += [f"problem: {problem}" for problem in plan.problems]
    if not plan.problems:
        lines.append(
            f"fits: at most {_gb(plan.worst.total)} of {_gb(plan.gpu_memory)} GB on each of "
            f"{plan.world_size} GPUs (stage {plan.worst.stage})"
        )
    elif fix:
        lines += [f"fix: {fix}", "does not fit; with the fix above it does"]
    else:
        lines.append("does not fit: it needs more GPUs or shorter sequences")
    return "\n".join(lines)


def _gb(size: float) -> str:
    return f"{size / GB:.1f}"


def _row(first: object, *cells: object) -> str:
    return f"{first:>5}" + "".join(f"{cell:>9}" for cell in cells)


def _sizes(plan: Plan) -> Iterator[str]:
    sizes = {short: plan.layout[name] for short, name in LAYOUT.items()}
    used = [f"{short} {size}" for short, size in sizes.items() if size and size > 1]
    layout = ", ".join([*used, f"DP {plan.data_parallel_size}"])
    yield plan.model
    yield f"{plan.total_parameters:,} parameters on {plan.world_size} GPUs ({layout})"
    each = max(stage.parameters for stage in plan.memory)
    yield f"at most {each:,} parameters on a GPU, {plan.pipeline.tokens:,} tokens a micro-batch\n"


def _memory(plan: Plan) -> Iterator[str]:
    yield "Memory of one GPU, by pipeline stage (GB = 10^9 bytes)"
    yield _row(*COLUMNS)
    for s in plan.memory:
        states = map(_gb, (s.weights, s.gradients, s.main_weights, s.adam))
        others = map(_gb, (s.activations, s.working, s.sync, s.engine, s.total))
        yield _row(s.stage, *states, s.in_flight, *others)
    yield "activ.: of all chunks of micro-batches in flight; work: for the moment, in one chunk's"
    yield "backward or the head; total: the worst of these phases\n"
    yield "Trainer and engine in each phase of a step"
    yield _row("stage", *plan.memory[0].phases, "host")
    for s in plan.memory:
        yield _row(s.stage, *(_gb(sum(parts)) for parts in s.phases.values()), _gb(s.host))
    yield (
        f"host: {_gb(plan.host_bytes)} GB a node for what leaves its GPUs; out and back takes "
        f"{plan.offload_s:.2f} s a step\n"
    )


def _estimates(plan: Plan) -> Iterator[str]:
    engine, pipeline, transfer = plan.engine, plan.pipeline, plan.transfer
    where = "the trainer's GPUs" if engine.shares_gpus else "GPUs of their own"
    yield f"vLLM: {engine.number} x {engine.gpus} of {where}, {_gb(engine.budget_bytes)} GB of each"
    longest, sequences = engine.max_model_len, engine.kv_tokens / engine.max_model_len
    yield (
        f"weights {_gb(engine.weight_bytes)} GB; caches {engine.kv_tokens:,} tokens of "
        f"{engine.kv_bytes_per_token:,} bytes, or {sequences:.1f} sequences of {longest:,}\n"
    )
    yield (
        f"Pipeline: {pipeline.micro_batches} micro-batches in a step if a prompt with its response "
        f"has {pipeline.expected_tokens:,} tokens"
    )
    yield f"(--expected-tokens); a stage idles {pipeline.bubble:.1%} of the step\n"
    yield (
        f"Sync over {transfer.transport} (estimate): {transfer.seconds:.2f} s for "
        f"{_gb(transfer.bytes)} GB: across stages {transfer.pipeline_s:.2f} s,"
    )
    yield (
        f"gathers at the same time {transfer.gather_s:.2f} s, into the engine "
        f"{transfer.engine_s:.2f} s"
    )
    network, node = max(transfer.received)
    yield f"A GPU receives {_gb(network)} GB over the network and {_gb(node)} GB inside its node.\n"
