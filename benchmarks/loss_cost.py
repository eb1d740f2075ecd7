"""What the loss costs beyond log-probs and entropies: groups, bounds, weights, ratios, clipping, metrics and packing, as a share of a step.

    python benchmarks/loss_cost.py --model models/SmolLM2-135M-Instruct

One process takes optimizer steps on responses of the quick start's size. The loss function's calls are recorded and then timed alone,
forward and backward, in turns with whole steps.
"""

import argparse
import random
import statistics
import time

import torch

from megatron_espo.config import load_config
from megatron_espo.data.packing import TrainSequence
from megatron_espo.mcore import runtime as mcore_runtime

PROMPTS, GROUP, PROMPT_TOKENS, RESPONSE_TOKENS = 16, 4, 40, 20


def make_groups(vocab_size: int) -> list[list[TrainSequence]]:
    """Random prompts and responses; every response has an advantage."""
    draw = random.Random(1)

    def ids(count: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(count)]

    groups = []
    for _ in range(PROMPTS):
        prompt, responses = ids(PROMPT_TOKENS), [ids(draw.randint(3, RESPONSE_TOKENS)) for _ in range(GROUP)]
        groups.append([TrainSequence(prompt, r, [-2.0] * len(r), draw.uniform(-1, 1)) for r in responses])
    return groups


def seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    config = load_config("examples/quickstart.yaml", [f"model.path={args.model}"])
    hf_config = config.validate_model()
    runtime = mcore_runtime.initialize()
    from megatron_espo.mcore import loss as loss_module
    from megatron_espo.mcore.learner import Learner, packing_options
    from megatron_espo.metrics import reduce_metrics_everywhere

    calls: list[tuple] = []
    original = loss_module.PolicyLoss.__call__

    def recording(self, batch, output, **options):
        calls.append((self, batch, output.detach().clone()))
        return original(self, batch, output, **options)

    learner, groups = Learner(config, hf_config, runtime), make_groups(hf_config["vocab_size"])
    loss_module.PolicyLoss.__call__ = recording
    learner.update(groups, lambda done, total: None)
    loss_module.PolicyLoss.__call__ = original

    def losses_alone() -> None:
        from megatron_espo.data.packing import batch_totals, pack

        sequences = [sequence for group in groups for sequence in group]
        totals = batch_totals(sequences, num_responses=len(sequences), num_response_tokens=1)
        pack(sequences, totals, **packing_options(config.megatron, runtime.groups))
        reports = []
        for policy_loss, batch, output in calls:
            leaf = output.requires_grad_()
            total, _, metrics = original(policy_loss, batch, leaf)
            torch.autograd.grad(total, leaf)
            reports.append(metrics)
        reduce_metrics_everywhere(reports, runtime.groups.dp_cp)

    losses_alone()
    rounds = [(seconds(lambda: learner.update(groups, lambda done, total: None)), seconds(losses_alone)) for _ in range(args.rounds)]
    step, alone = (statistics.median(column) for column in zip(*rounds, strict=True))
    tokens = sum(len(batch.targets) for _, batch, _ in calls)
    print(
        f"{tokens} response tokens in {len(calls)} micro-batches: step {step:.2f} s, loss alone {alone * 1000:.1f} ms: "
        f"{alone / step:.2%} of the step (shares of the rounds: {', '.join(f'{a / s:.2%}' for s, a in rounds)})"
    )
    mcore_runtime.shutdown()


if __name__ == "__main__":
    main()
