"""The output layer, log-prob and entropy as one op: from hidden states to both, keeping nothing it does not need."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_espo.numerics import paths
from megatron_espo.numerics.collectives import all_gather, reduce_scatter
from megatron_espo.numerics.logits import Shard, check_arguments
from megatron_espo.numerics.plan import HeadPlan, plan_head
from megatron_espo.numerics.products import accumulate, multiply, wide_products
from megatron_espo.numerics.statistics import gradient_terms, logprob_and_entropy


def linear_logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    group: dist.ProcessGroup | None,
    *,
    positions: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    entropy_grad: bool = False,
    sequence_parallel: bool = False,
    budget_bytes: int | None = None,
    float32_logits: bool | None = None,
    path: paths.Path = "auto",
) -> tuple[Tensor, Tensor]:
    """``vocab_parallel_logprob_entropy(hidden @ weight.T, …)`` without the logits of all tokens at once.

    Works through the tokens in chunks. The budget decides between two memory modes (:func:`plan_head` tells which):
    keep one buffer of logits, which backward overwrites with their gradient, or keep none and compute each chunk again.
    The numbers are the same. Without gradients (scoring) nothing is kept.

    Collectives over ``group``: an all-gather of four floats per token; with sequence parallelism an all-gather of the
    hidden states in each direction and a reduce-scatter of their gradient; without it an all-reduce of that gradient.

    The weight's gradient is summed in float32. Where Megatron's DDP gave the weight a ``main_grad`` it is added there,
    ``grad_added_to_main_grad`` is set, and autograd gets a dummy: zeros if ``zero_out_wgrad`` asks for it, as for an
    embedding tied to the output layer, whose own gradient comes through autograd.

    Args:
        hidden: ``[tokens, hidden]``; under sequence parallelism this rank's ``[tokens/tp, hidden]``.
        weight: ``[vocab/tp, hidden]``, of the same dtype.
        targets: int64 global token ids, one per scored token.
        positions: int64 indices, without repetition, of the tokens to score among all (gathered) tokens; default all.
        budget_bytes: limit of the memory that grows with the vocabulary; None: keep the logits.
        float32_logits: do not round the logits to bfloat16. Default: where it is free (CUDA, torch >= 2.8).
        temperature, vocab_size, entropy_grad, path: see :func:`~megatron_espo.numerics.vocab_parallel_logprob_entropy`.

    Returns:
        ``(logprob, entropy)``, ``[scored tokens]``, nats, float32, the same on every rank.

    Raises:
        ValueError: arguments that do not fit together, or a budget below one row.
    """
    size = 1 if group is None else group.size()
    _check_tensors(hidden, weight)
    tokens = hidden.shape[0] * (size if sequence_parallel else 1) if positions is None else positions.shape[0]
    check_arguments(targets, (tokens, weight.shape[0]), size, temperature, vocab_size)
    if float32_logits is None:
        float32_logits = wide_products(hidden.device.type)
    plan = _plan(hidden, tokens, weight.shape[0], budget_bytes, float32_logits)
    options = _Options(
        shard=Shard(weight.shape[0], group, vocab_size, 1.0 / temperature),
        plan=plan,
        path=paths.choose(path, hidden.device, hidden.dtype, plan.chunk_tokens * weight.shape[0]),
        logits_dtype=torch.float32 if float32_logits and hidden.dtype.itemsize < 4 else hidden.dtype,
        sequence_parallel=sequence_parallel and size > 1,
        entropy_grad=entropy_grad,
        training=torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad),
    )
    return _LinearLogprobEntropy.apply(hidden, weight, targets, positions, options)


def _check_tensors(hidden: Tensor, weight: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            "hidden must be [tokens, hidden] and weight [vocab/tp, hidden], of one dtype; got "
            f"{hidden.dtype} {tuple(hidden.shape)} and {weight.dtype} {tuple(weight.shape)}"
        )


def _plan(hidden: Tensor, tokens: int, columns: int, budget_bytes: int | None, float32_logits: bool) -> HeadPlan:
    return plan_head(
        tokens,
        columns,
        dtype=hidden.dtype,
        budget_bytes=budget_bytes,
        float32_logits=float32_logits,
        convert_gradient=not hidden.is_cuda and hidden.dtype.itemsize < 4,
    )


@dataclass(frozen=True)
class _Options:
    shard: Shard
    plan: HeadPlan
    path: paths.Path
    logits_dtype: torch.dtype
    sequence_parallel: bool
    entropy_grad: bool
    training: bool


class _LinearLogprobEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, positions: Tensor | None, options: _Options
    ) -> tuple[Tensor, Tensor]:
        shard, plan = options.shard, options.plan
        rows = _scored_rows(hidden, positions, options)
        local = shard.local(targets)
        keep = options.training and plan.keep_logits
        store = rows.new_empty(len(targets), weight.shape[0]) if keep else None
        same_type = options.logits_dtype == rows.dtype
        buffer = None if keep and same_type else _chunk(rows, weight, options.logits_dtype, plan)
        stats, tile_maxima = [], []
        for part in _parts(len(targets), plan.chunk_tokens):
            logits = store[part] if buffer is None else buffer[: len(targets[part])]
            multiply(rows[part], weight.t(), logits)
            narrow = store[part] if keep and not same_type else None
            part_stats, tile_max = paths.statistics(
                options.path, logits, shard.columns, local[part], shard.scale, store=narrow
            )
            stats.append(part_stats)
            tile_maxima.append(tile_max)
        merged = shard.merge(torch.cat(stats))
        ctx.save_for_backward(hidden, weight, targets, positions, *merged)
        ctx.options, ctx.store = options, store
        ctx.tile_max = torch.cat(tile_maxima) if keep and not same_type else None
        ctx.set_materialize_grads(False)
        logprob, entropy = logprob_and_entropy(*merged, shard.scale)
        if not options.entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None):
        hidden, weight, targets, positions, *merged = ctx.saved_tensors
        options: _Options = ctx.options
        terms = gradient_terms(*merged, options.shard.scale, grad_logprob, grad_entropy)
        rows = _scored_rows(hidden, positions, options)
        # The store is overwritten below; a second backward finds none and computes the logits again.
        store, tile_max, ctx.store, ctx.tile_max = ctx.store, ctx.tile_max, None, None
        chunks = _gradient_chunks(
            rows, weight, options.shard.local(targets), terms, options, grad_entropy is not None, store, tile_max
        )
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_rows = torch.empty_like(rows) if need_hidden else None
        sum_weight = _weight_accumulator(weight) if need_weight else None
        reduction = None
        for part, grad_logits in chunks:
            if need_hidden:
                torch.mm(grad_logits, weight, out=grad_rows[part])
                if part.stop >= len(targets):  # the last: reduce while the weight's product runs
                    reduction = _Reduction(grad_rows, hidden, positions, options)
            if need_weight:
                accumulate(sum_weight, grad_logits.t(), rows[part])
        if need_hidden and reduction is None:
            reduction = _Reduction(grad_rows, hidden, positions, options)
        grad_hidden = reduction.wait() if need_hidden else None
        return grad_hidden, _weight_gradient(weight, sum_weight) if need_weight else None, None, None, None


def _parts(tokens: int, chunk: int) -> list[slice]:
    return [slice(i, min(i + chunk, tokens)) for i in range(0, max(tokens, 1), max(chunk, 1))]


def _chunk(rows: Tensor, weight: Tensor, dtype: torch.dtype, plan: HeadPlan) -> Tensor:
    return torch.empty(min(plan.chunk_tokens, len(rows)), weight.shape[0], dtype=dtype, device=rows.device)


def _scored_rows(hidden: Tensor, positions: Tensor | None, options: _Options) -> Tensor:
    """Hidden states of the scored tokens; all-gathered under sequence parallelism (anew in backward)."""
    if options.sequence_parallel:
        group = options.shard.group
        gathered = hidden.new_empty(group.size() * hidden.shape[0], hidden.shape[1])
        all_gather(gathered, hidden.contiguous(), group)
        hidden = gathered
    return hidden if positions is None else hidden[positions]


def _gradient_chunks(
    rows: Tensor, weight: Tensor, local: Tensor, terms: Tensor, options: _Options, entropy: bool,
    store: Tensor | None, tile_max: Tensor | None,
):  # fmt: skip
    """Yield ``(slice of tokens, gradient of their logits)``; a yielded buffer is reused for the next chunk."""
    shard, plan = options.shard, options.plan
    columns, scale = shard.columns, shard.scale
    if store is not None:
        whole = store.is_cuda or store.dtype.itemsize >= 4  # else the float32 copy of a chunk bounds the memory
        for part in _parts(len(rows), len(rows) if whole else plan.chunk_tokens):
            shift = None if tile_max is None else tile_max[part]
            x = store[part]
            paths.gradient(options.path, x, x, columns, local[part], terms[part], scale, entropy, tile_max=shift)
            yield part, x
        return
    logits = _chunk(rows, weight, options.logits_dtype, plan)
    grad = logits if options.logits_dtype == rows.dtype else _chunk(rows, weight, rows.dtype, plan)
    for part in _parts(len(rows), plan.chunk_tokens):
        x, dx = (t[: part.stop - part.start] for t in (logits, grad))
        multiply(rows[part], weight.t(), x)
        paths.gradient(options.path, x, dx, columns, local[part], terms[part], scale, entropy)
        yield part, dx


class _Reduction:
    """The sum of the hidden states' gradient over the group, started at once, waited for later."""

    def __init__(self, grad_rows: Tensor, hidden: Tensor, positions: Tensor | None, options: _Options) -> None:
        group = options.shard.group
        size = 1 if group is None else group.size()
        full = grad_rows
        if positions is not None:
            tokens = hidden.shape[0] * (size if options.sequence_parallel else 1)
            full = grad_rows.new_zeros(tokens, hidden.shape[1])
            full[positions] = grad_rows
        self.result, self.handle = full, None
        if options.sequence_parallel:
            self.result = torch.empty_like(hidden, memory_format=torch.contiguous_format)
            self.handle = reduce_scatter(self.result, full, group)
        elif size > 1:
            self.handle = dist.all_reduce(full, group=group, async_op=True)
        self.full = full  # alive until the collective is done

    def wait(self) -> Tensor:
        if self.handle is not None:
            self.handle.wait()
        return self.result


def _has_main_grad(weight: Tensor) -> bool:
    # Megatron-FSDP manages its own buffers: it gets an ordinary gradient.
    by_ddp = hasattr(weight, "grad_added_to_main_grad") and hasattr(weight, "main_grad")
    return by_ddp and not hasattr(weight, "__fsdp_param__")


def _weight_accumulator(weight: Tensor) -> Tensor:
    if _has_main_grad(weight):
        return weight.main_grad
    return torch.zeros_like(weight, dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32)


def _weight_gradient(weight: Tensor, total: Tensor) -> Tensor:
    if not _has_main_grad(weight):
        return total.to(weight.dtype)
    weight.grad_added_to_main_grad = True
    # DDP's hook wants a gradient to be there, and adds it only if `zero_out_wgrad` is set: then it must be zeros.
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)
