"""Times, memory and errors of vocabulary-parallel log-prob and entropy, against references.

    python benchmarks/logprob_entropy.py        # CPU: float32 and bfloat16, one shard and two
    python benchmarks/logprob_entropy.py --device cuda --tokens 8192 --vocab 152064 --tp 1

Every number is a ratio of times from the same round (median over rounds), a multiple of the shard,
or an error against float64. Times are forward and backward; entropy is detached unless a line says
otherwise.

    limit          two exp passes over the shard and 1.5 copies of it
    traffic        1.5 copies of the shard: it is read twice and written once
    log_softmax    torch: (all-gathered) logits -> log_softmax -> log-prob and entropy
    megatron       Megatron-Core's vocab_parallel_cross_entropy: log-prob only, in float32
    three GEMMs    products of the linear head: logits, gradients of hidden states and weight
    liger          on a GPU: liger-kernel's tensor-parallel head, with entropy, if it is installed
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.measure import (  # noqa: E402
    Contestant,
    counted_collectives,
    interleaved,
    peak_bytes,
    ratio,
)
from megatron_espo.numerics import linear_logprob_entropy, vocab_parallel_logprob_entropy  # noqa: E402


class _Gather(torch.autograd.Function):
    """Whole logits from shards; a rank's gradient is that of its columns."""

    @staticmethod
    def forward(ctx, shard: Tensor, group) -> Tensor:
        ctx.mine = slice(group.rank() * shard.shape[1], (group.rank() + 1) * shard.shape[1])
        parts = [torch.empty_like(shard) for _ in range(group.size())]
        dist.all_gather(parts, shard, group=group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad[:, ctx.mine].contiguous(), None


def log_softmax_reference(logits: Tensor, targets: Tensor, group) -> tuple[Tensor, Tensor]:
    """The reference in plain torch."""
    whole = logits if group is None else _Gather.apply(logits, group)
    logp = torch.log_softmax(whole.float(), -1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), entropy


def megatron_cross_entropy() -> Callable | None:
    """Megatron's function, or None where Megatron-Core is not installed."""
    try:
        from megatron.core import parallel_state, tensor_parallel
    except ImportError:
        return None
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    return tensor_parallel.vocab_parallel_cross_entropy


def liger_head() -> Callable | None:
    """liger-kernel's head with entropy, or None where it is not installed."""
    try:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
            LigerFusedLinearScaledCrossEntropyTPFunction as Head,
        )
    except ImportError:
        return None
    return lambda *inputs: Head.apply(*inputs, return_entropy=True)


def contestants(shard: Tensor, targets: Tensor, group) -> dict[str, Contestant]:
    """The timed functions, by name. ``shard`` is ``[tokens, vocab/tp]`` of the dtype under test."""
    weights = torch.randn(len(targets), device=shard.device)
    scratch = torch.empty_like(shard)

    def leaf() -> Tensor:
        return shard.detach().requires_grad_()

    def train(function: Callable, **options) -> Callable:
        def run(logits: Tensor):
            logprob, entropy = function(logits, targets, group, **options)
            loss = (logprob * weights).sum()
            if entropy.requires_grad:
                loss = loss + (entropy * weights).sum()
            return torch.autograd.grad(loss, logits)

        return run

    def copied_leaf() -> Tensor:
        return shard.clone().requires_grad_()

    ours = vocab_parallel_logprob_entropy
    entries: dict[str, Contestant] = {
        "exp": (lambda: shard, lambda x: torch.exp(x, out=scratch)),
        "copy": (lambda: shard, lambda x: x.clone()),
        "ours": (leaf, train(ours)),
        "ours, entropy differentiable": (leaf, train(ours, entropy_grad=True)),
        "ours, logits donated": (copied_leaf, train(ours, donate_logits=True)),
        "ours, plain torch": (leaf, train(ours, path="torch")),
        "log_softmax": (leaf, train(log_softmax_reference)),
    }
    cross_entropy = megatron_cross_entropy()
    if cross_entropy is not None:

        def run(logits: Tensor):
            loss = cross_entropy(logits.unsqueeze(1), targets.unsqueeze(1))
            return torch.autograd.grad((loss.squeeze(1) * weights).sum(), logits)

        entries["megatron"] = (copied_leaf, run)
    return entries


def errors(shard: Tensor, targets: Tensor, group, first: int) -> tuple[float, float, float]:
    """Largest error of log-prob, entropy and gradient against float64 on the first 64 tokens."""
    logits, targets = shard[:64].clone().requires_grad_(), targets[:64]
    logprob, entropy = vocab_parallel_logprob_entropy(logits, targets, group, path="auto")
    (gradient,) = torch.autograd.grad(logprob.sum(), logits)
    parts = [logits.detach()]
    if group is not None:
        parts = [torch.empty_like(parts[0]) for _ in range(group.size())]
        dist.all_gather(parts, logits.detach(), group=group)
    whole = torch.cat(parts, 1).double().requires_grad_()
    logp = torch.log_softmax(whole, -1)
    expected = logp.gather(1, targets[:, None]).squeeze(1)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), whole)
    expected_entropy = -(logp.exp() * logp).sum(-1)
    mine = expected_gradient[:, first : first + logits.shape[1]]
    pairs = ((logprob, expected), (entropy, expected_entropy), (gradient, mine))
    return tuple((a.double() - b).abs().max().item() for a, b in pairs)


def same_targets(args: argparse.Namespace, vocab: int) -> Tensor:
    """Random token ids, the same on every rank."""
    return torch.randint(0, vocab, (args.tokens,), generator=torch.Generator().manual_seed(99)).to(
        args.device
    )


def report_logits(args: argparse.Namespace, group, dtype: torch.dtype) -> None:
    """One block of the report: the op on logits."""
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    width = args.vocab // size
    generator = torch.Generator().manual_seed(rank)
    shard = (torch.randn(args.tokens, width, generator=generator) * 3).to(args.device, dtype)
    targets = same_targets(args, width * size)
    entries = contestants(shard, targets, group)
    times = interleaved(entries, args.rounds, args.clock)
    with counted_collectives() as calls:
        entries["ours"][1](entries["ours"][0]())
    unit = args.tokens * width * dtype.itemsize
    logits = shard.detach().requires_grad_()
    forward = peak_bytes(lambda: vocab_parallel_logprob_entropy(logits, targets, group))
    wrong = errors(shard, targets, group, rank * width)
    peaks = {}
    for name in times:
        if name not in ("exp", "copy"):
            prepared = entries[name][0]()
            peaks[name] = peak_bytes(lambda n=name, p=prepared: entries[n][1](p))
    if rank != 0:
        return
    per_token = sum(sent for _, sent in calls) / args.tokens / 4
    shape = f"{args.tokens} tokens, vocabulary {args.vocab}, TP={size}"
    print(f"\n{shape}, {dtype}, {args.device}, {args.clock} clock")
    print(
        f"  collectives of forward + backward: {len(calls)}, floats sent per token: {per_token:g}"
    )
    print(
        "  errors against float64: log-prob {:.1e}, entropy {:.1e}, gradient {:.1e}".format(*wrong)
    )
    print(f"  forward keeps and uses {forward / unit:.3f} shard beside its input")
    columns = f"{'ms':>10}{'time / limit':>14}{'/ traffic':>11}{'ours faster by':>16}"
    columns += f"{'peak, shards':>14}{'bf16 shards':>13}"
    print(f"  {'':32}{columns}")
    copied = 2 * unit / median(times["copy"]) / 1e9
    print(f"  {'copy':32}{median(times['copy']) * 1e3:10.3f} {copied:.0f} GB/s, read and written")
    for name in peaks:
        spent = f"{median(times[name]) * 1e3:10.3f}"
        limit = ratio(times, name, lambda r: 2 * r["exp"] + 1.5 * r["copy"])
        traffic = ratio(times, name, lambda r: 1.5 * r["copy"])
        gain = ratio(times, name, lambda r: r["ours"])
        peak, bf16 = peaks[name] / unit, peaks[name] / (args.tokens * width * 2)
        print(
            f"  {name:32}{spent}{limit:14.2f}{traffic:11.2f}{gain:15.1f}x{peak:14.2f}{bf16:13.2f}"
        )


def report_head(args: argparse.Namespace, group, dtype: torch.dtype) -> None:
    """One block of the report: from hidden states, against the three matrix products."""
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    width, generator = args.vocab // size, torch.Generator().manual_seed(rank)
    hidden = torch.randn(args.tokens, args.hidden, generator=torch.Generator().manual_seed(5)).to(
        args.device, dtype
    )
    weight = (torch.randn(width, args.hidden, generator=generator) * 0.1).to(args.device, dtype)
    targets = same_targets(args, width * size)
    hidden.requires_grad_(), weight.requires_grad_()
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    weight.grad_added_to_main_grad = False
    logits = torch.empty(args.tokens, width, device=args.device, dtype=dtype)

    def products(_):
        torch.mm(hidden.detach(), weight.detach().t(), out=logits)
        return torch.mm(logits, weight.detach()), torch.mm(logits.t(), hidden.detach())

    def train(budget: int | None) -> Callable:
        def run(_):
            out = linear_logprob_entropy(hidden, weight, targets, group, budget_bytes=budget)[0]
            return torch.autograd.grad(out.sum(), (hidden, weight))

        return run

    def unfused(_):
        out = vocab_parallel_logprob_entropy(
            hidden @ weight.t(), targets, group, donate_logits=True
        )[0]
        return torch.autograd.grad(out.sum(), (hidden, weight))

    unit = args.tokens * width * dtype.itemsize
    entries = {
        "three GEMMs": products,
        "head, logits kept": train(None),
        "head, an eighth of the shard": train(unit // 8),
        "matmul + logits op": unfused,
    }
    if hidden.is_cuda and (liger := liger_head()):

        def with_entropy(_):
            loss, _entropy = liger(hidden, weight, targets, group or dist.group.WORLD)
            return torch.autograd.grad(loss.sum(), (hidden, weight))

        entries["liger"] = with_entropy
    times = interleaved(
        {name: ((lambda: None), run) for name, run in entries.items()}, args.rounds, args.clock
    )
    peaks = {
        name: peak_bytes(lambda r=run: r(None))
        for name, run in entries.items()
        if name != "three GEMMs"
    }
    if rank != 0:
        return
    shape = f"{args.tokens} tokens, hidden {args.hidden}, vocabulary {args.vocab}"
    print(f"\nlinear head: {shape}, TP={size}, {dtype}, {args.device}")
    gemms = median(times["three GEMMs"])
    rate = 6 * args.tokens * width * args.hidden / gemms / 1e12
    print(f"  {'three GEMMs':32}{gemms * 1e3:10.2f} ms, {rate:.0f} TFLOP/s")
    print(f"  {'':32}{'ms':>10}{'time / three GEMMs':>20}{'peak, shards of logits':>24}")
    for name, peak in peaks.items():
        relative, spent = ratio(times, name, lambda r: r["three GEMMs"]), median(times[name]) * 1e3
        print(f"  {name:32}{spent:10.2f}{relative:20.2f}{peak / unit:24.2f}")


def main() -> None:
    """Start torchrun for each number of shards; its workers print the report."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    for name, default in {"tokens": 1024, "vocab": 32768, "hidden": 256, "rounds": 9}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", nargs="+", default=dtypes, choices=dtypes)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a rank")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.worker:
        torchrun = "-m torch.distributed.run --standalone --nproc-per-node".split()
        for size in args.tp:
            command = [sys.executable, *torchrun, str(size), __file__, *sys.argv[1:], "--worker"]
            subprocess.run(command, check=True)
        return
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    if args.device == "cuda":
        torch.cuda.set_device(dist.get_rank())
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    for name in args.dtype:
        report_logits(args, group, getattr(torch, name))
        report_head(args, group, getattr(torch, name))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
