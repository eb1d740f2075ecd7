"""Output layer, log-prob and entropy as one op, without the logits of all tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_espo.numerics.plan import HeadPlan, plan_head
from megatron_espo.numerics.shard import (
    Path,
    Shard,
    all_gather,
    check_targets,
    choose_path,
    reduce_scatter,
)
from megatron_espo.numerics.statistics import accumulation_dtype, logprob_and_entropy


def linear_logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    group: dist.ProcessGroup | None,
    *,
    positions: Tensor | None = None,
    sampling_mask: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    entropy_grad: bool = False,
    sequence_parallel: bool = False,
    budget_bytes: int | None = None,
    path: Path = "auto",
) -> tuple[Tensor, Tensor]:
    """``vocab_parallel_logprob_entropy(hidden @ weight.T, …)``, by chunks of tokens.

    The budget selects one of two memory modes (:func:`plan_head`): one buffer keeps all logits,
    and backward overwrites them with their gradient; or backward computes each chunk of logits
    again. The numbers are the same. Without gradients (scoring) nothing is kept.

    Collectives over ``group``: an all-gather of four floats per token. With sequence parallelism
    also an all-gather of the hidden states in each direction and a reduce-scatter of their
    gradient; without it an all-reduce of that gradient.

    The logits are not rounded to bfloat16: one of 20 would be off by up to 0.06 nats. The weight's
    gradient is summed in float32. Where Megatron's DDP gave the weight a
    ``main_grad``, the gradient is added there, ``grad_added_to_main_grad`` is set, and autograd
    gets a dummy: zeros if ``zero_out_wgrad`` is set, as for an embedding tied to the output layer,
    whose own gradient comes through autograd.

    Args:
        hidden: ``[tokens, hidden]``; with sequence parallelism this rank's ``[tokens/tp, hidden]``.
        weight: ``[vocab/tp, hidden]``, of the same dtype.
        targets: int64 global token ids, one for each scored token.
        group: tensor-parallel process group; None: the whole vocabulary is on this rank.
        positions: int64 indices of the scored tokens among all (gathered) tokens; default: all.
        sampling_mask: ``[2, kept]`` integers: index of a scored token (ascending) and global id of
            each token that the sampler kept. Log-prob and entropy are those of the distribution
            over the kept ids; the other logits become ``-inf``. On a GPU the device is waited for
            once. ``None``: the whole vocabulary.
        sequence_parallel: the tokens of ``hidden`` are sharded over ``group``.
        budget_bytes: limit of the memory that grows with the vocabulary; None: keep the logits.
        temperature, vocab_size, entropy_grad, path: see
            :func:`~megatron_espo.numerics.vocab_parallel_logprob_entropy`.

    Returns:
        ``(logprob, entropy)``, ``[scored tokens]``, nats, float32, the same on every rank.

    Raises:
        ValueError: arguments that do not fit together, or a budget below one row.
    """
    shapes = hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1]
    if not shapes or hidden.dtype != weight.dtype:
        raise ValueError(
            "hidden must be [tokens, hidden] and weight [vocab/tp, hidden], of one dtype; got "
            f"{hidden.dtype} {list(hidden.shape)} and {weight.dtype} {list(weight.shape)}"
        )
    size, width = 1 if group is None else group.size(), weight.shape[0]
    tokens = hidden.shape[0] * (size if sequence_parallel else 1)
    if positions is not None:
        tokens = positions.shape[0]
    check_targets(targets, tokens)
    plan = plan_head(tokens, width, dtype=hidden.dtype, budget_bytes=budget_bytes)
    path = choose_path(path, hidden, plan.chunk_tokens * width)
    shard, kept = Shard(width, group, vocab_size, temperature, path), None
    if sampling_mask is not None:
        rows, columns = shard.local_columns(sampling_mask)
        ends = [0, *(part.stop for part in _parts(tokens, plan.chunk_tokens))]
        sizes = torch.searchsorted(rows, rows.new_tensor(ends)).diff().tolist()
        kept = torch.stack((rows % plan.chunk_tokens, columns)).split(sizes, dim=1)
    call = _Call(
        shard=shard,
        plan=plan,
        kept=kept,
        sequence_parallel=sequence_parallel and size > 1,
        entropy_grad=entropy_grad,
        training=torch.is_grad_enabled(),
    )
    return _LinearLogprobEntropy.apply(hidden, weight, targets, positions, call)


@dataclass(frozen=True)
class _Call:
    """The options of one call.

    Attributes:
        kept: for each chunk of tokens, row in the chunk and column of the logits that are kept.
    """

    shard: Shard
    plan: HeadPlan
    kept: Sequence[Tensor] | None
    sequence_parallel: bool
    entropy_grad: bool
    training: bool

    def scored_rows(self, hidden: Tensor, positions: Tensor | None) -> Tensor:
        """Hidden states of the scored tokens; with sequence parallelism one all-gather."""
        if self.sequence_parallel:
            gathered = hidden.new_empty(self.shard.size * len(hidden), hidden.shape[1])
            all_gather(gathered, hidden.contiguous(), self.shard.group)
            hidden = gathered
        return hidden if positions is None else hidden[positions]

    def compute_logits(self, rows: Tensor, weight: Tensor, part: slice, out: Tensor) -> None:
        """Logits of one chunk of tokens; ``-inf`` where the sampler did not keep the id."""
        _multiply(rows[part], weight.t(), out)
        if self.kept is not None:
            cells = tuple(self.kept[part.start // self.plan.chunk_tokens].long())
            values = out[cells]
            out.fill_(-torch.inf)
            out[cells] = values

    def sum_over_ranks(
        self, grad_rows: Tensor, hidden: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, dist.Work | None, Tensor]:
        """Start the sum of the gradient of the hidden states over the group.

        Returns:
            The gradient of ``hidden``, the collective to wait for, and its input, which must stay
            alive until then.
        """
        shard, whole, handle = self.shard, grad_rows, None
        if positions is not None:
            tokens = len(hidden) * (shard.size if self.sequence_parallel else 1)
            whole = grad_rows.new_zeros(tokens, hidden.shape[1])
            whole.index_put_((positions,), grad_rows, accumulate=True)
        if self.sequence_parallel:
            result = torch.empty_like(hidden, memory_format=torch.contiguous_format)
            return result, reduce_scatter(result, whole, shard.group), whole
        if shard.size > 1:
            handle = dist.all_reduce(whole, group=shard.group, async_op=True)
        return whole, handle, whole


class _LinearLogprobEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        positions: Tensor | None,
        call: _Call,
    ) -> tuple[Tensor, Tensor]:
        shard, plan = call.shard, call.plan
        rows = call.scored_rows(hidden, positions)
        dtype = accumulation_dtype(rows.dtype)
        keep = call.training and plan.keep_logits
        store = rows.new_empty(len(targets) if keep else 0, len(weight))
        in_place = keep and dtype == rows.dtype
        buffer = store if in_place else rows.new_empty(plan.chunk_tokens, len(weight), dtype=dtype)
        stats, tile_maxima = [], []
        for part in _parts(len(targets), plan.chunk_tokens):
            logits = buffer[part] if in_place else buffer[: part.stop - part.start]
            call.compute_logits(rows, weight, part, logits)
            narrow = store[part] if keep and not in_place else None
            part_stats, tile_max = shard.statistics(logits, targets[part], narrow)
            stats.append(part_stats)
            if tile_max is not None:
                tile_maxima.append(tile_max)
        sums = shard.merge(torch.cat(stats))
        ctx.save_for_backward(hidden, weight, targets, positions, sums)
        ctx.call, ctx.store = call, store if keep else None
        ctx.tile_max = torch.cat(tile_maxima) if tile_maxima else None
        ctx.set_materialize_grads(False)
        logprob, entropy = logprob_and_entropy(sums, shard.scale)
        if not call.entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None):
        hidden, weight, targets, positions, sums = ctx.saved_tensors
        call: _Call = ctx.call
        shard = call.shard
        rows = call.scored_rows(hidden, positions)
        # The store is overwritten below: a second backward computes the logits again.
        store, tile_max = ctx.store, ctx.tile_max
        ctx.store = ctx.tile_max = None

        def logit_gradients() -> Iterator[tuple[slice, Tensor]]:
            """Tokens and the gradient of their logits; the next chunk reuses the buffer."""
            chunk = call.plan.chunk_tokens

            def gradient(x: Tensor, dx: Tensor, part: slice, shift: Tensor | None = None) -> None:
                by_logprob = None if grad_logprob is None else grad_logprob[part]
                by_entropy = None if grad_entropy is None else grad_entropy[part]
                shard.gradient(x, dx, targets[part], sums[part], by_logprob, by_entropy, shift)

            if store is not None:
                # On CPU a float32 copy of narrower logits needs the memory of a chunk.
                whole = store.is_cuda or store.dtype.itemsize >= 4
                for part in _parts(len(rows), len(rows) if whole else chunk):
                    x, shift = store[part], None if tile_max is None else tile_max[part]
                    gradient(x, x, part, shift)
                    yield part, x
                return
            buffer, dtype = rows.new_empty(chunk, len(weight)), accumulation_dtype(rows.dtype)
            for part in _parts(len(rows), chunk):
                dx = buffer[: part.stop - part.start]
                x = dx if dtype == dx.dtype else torch.empty_like(dx, dtype=dtype)
                call.compute_logits(rows, weight, part, x)
                gradient(x, dx, part)
                del x  # on CPU the weight's product makes a float32 copy of dx
                yield part, dx

        # Rows of padding get no gradient and give none: NaN times 0 would be NaN.
        true, true_weight = slice(shard.columns), weight[: shard.columns]
        grad_rows = torch.empty_like(rows)
        total = _weight_accumulator(weight) if ctx.needs_input_grad[1] else None
        grad_hidden = handle = kept_alive = None  # noqa: F841
        for part, grad_logits in logit_gradients():
            torch.mm(grad_logits[:, true], true_weight, out=grad_rows[part])
            if part.stop >= len(targets):  # the last: communicate during the weight's product
                grad_hidden, handle, kept_alive = call.sum_over_ranks(grad_rows, hidden, positions)
            if total is not None:
                _accumulate(total, grad_logits.t(), rows[part])
        if handle is not None:
            handle.wait()
        grad_weight = None if total is None else _weight_gradient(weight, total)
        return grad_hidden, grad_weight, None, None, None


def _parts(tokens: int, chunk: int) -> list[slice]:
    return [slice(i, min(i + chunk, tokens)) for i in range(0, max(tokens, 1), max(chunk, 1))]


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a @ b``; ``out`` may be float32 where ``a`` and ``b`` are narrower."""
    if a.is_cuda and a.dtype != out.dtype:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _accumulate(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a @ b``, rounded once where ``out`` is float32 and ``a`` and ``b`` are narrower."""
    if a.is_cuda and a.dtype != out.dtype == torch.float32:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def _has_main_grad(weight: Tensor) -> bool:
    # Megatron-FSDP manages its own buffers and gets an ordinary gradient.
    by_ddp = hasattr(weight, "grad_added_to_main_grad") and hasattr(weight, "main_grad")
    return by_ddp and not hasattr(weight, "__fsdp_param__")


def _weight_accumulator(weight: Tensor) -> Tensor:
    if _has_main_grad(weight):
        return weight.main_grad  # type: ignore[attr-defined]
    return torch.zeros_like(weight, dtype=accumulation_dtype(weight.dtype))


def _weight_gradient(weight: Tensor, total: Tensor) -> Tensor:
    if not _has_main_grad(weight):
        return total.to(weight.dtype)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    # DDP's hook needs a gradient, and adds it only if `zero_out_wgrad` is set: it must be 0 then.
    dummy = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return dummy(weight)
