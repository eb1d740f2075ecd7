"""Cost of the loss beyond log-probs and entropies, as a share of an optimizer step.

    python benchmarks/loss_cost.py --model models/SmolLM2-135M-Instruct

The loss is segments, bounds, weights, ratios, clipping, metrics and packing. One process takes
optimizer steps on responses of the quick start's size. The calls of the loss are recorded and then
timed alone, forward and backward; rounds alternate between whole steps and the loss alone.
"""

import argparse
import random
from statistics import median
from unittest.mock import patch

import torch
from measure import ROOT, seconds

from megatron_espo.config import load_config
from megatron_espo.config.checks import check_model
from megatron_espo.data.packing import TrainSequence, batch_totals, pack
from megatron_espo.distributed import runtime as distributed_runtime

PROMPTS, GROUP, PROMPT_TOKENS, RESPONSE_TOKENS = 16, 4, 40, 20


def make_groups(vocab_size: int) -> list[list[TrainSequence]]:
    """Random prompts and responses; every response has an advantage."""
    draw = random.Random(1)

    def ids(count: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(count)]

    groups = []
    for _ in range(PROMPTS):
        prompt = ids(PROMPT_TOKENS)
        responses = [ids(draw.randint(3, RESPONSE_TOKENS)) for _ in range(GROUP)]
        groups.append(
            [TrainSequence(prompt, r, [-2.0] * len(r), draw.uniform(-1, 1)) for r in responses]
        )
    return groups


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    config = load_config(str(ROOT / "examples/quickstart.yaml"), [f"model.path={args.model}"])
    spec = check_model(config)
    runtime = distributed_runtime.initialize()
    from megatron_espo.megatron.actor import Actor, packing_spec
    from megatron_espo.megatron.loss import PolicyLoss
    from megatron_espo.monitoring.metrics import reduce_metrics_everywhere

    calls: list[tuple] = []
    original = PolicyLoss.__call__

    def recording(self, batch, output, **options):
        calls.append((self, batch, output.detach().clone()))
        return original(self, batch, output, **options)

    actor, groups = Actor(config, spec, runtime), make_groups(spec.vocab_size)
    with patch.object(PolicyLoss, "__call__", recording):
        actor.update(groups, lambda done, total: None)

    def loss_alone() -> None:
        sequences = [sequence for group in groups for sequence in group]
        totals = batch_totals(sequences, num_responses=len(sequences), num_response_tokens=1)
        pack(sequences, totals, packing_spec(config.megatron, runtime.groups))
        reports = []
        for policy_loss, batch, output in calls:
            leaf = output.requires_grad_()
            total, _, metrics = original(policy_loss, batch, leaf)
            torch.autograd.grad(total, leaf)
            reports.append(metrics)
        reduce_metrics_everywhere(reports, runtime.groups.dp_cp)

    loss_alone()
    rounds = [
        (seconds(lambda: actor.update(groups, lambda done, total: None)), seconds(loss_alone))
        for _ in range(args.rounds)
    ]
    step, alone = (median(column) for column in zip(*rounds, strict=True))
    tokens = sum(len(batch.targets) for _, batch, _ in calls)
    print(
        f"{tokens} response tokens in {len(calls)} micro-batches: step {step:.2f} s, loss alone "
        f"{alone * 1000:.1f} ms: {alone / step:.2%} of the step (shares of the rounds: "
        f"{', '.join(f'{a / s:.2%}' for s, a in rounds)})"
    )
    distributed_runtime.shutdown()


if __name__ == "__main__":
    main()
