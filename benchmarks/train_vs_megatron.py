"""An optimizer step with ESPO's loss against the same step with Megatron-Core's own GPT loss.

    torchrun --nproc-per-node 2 benchmarks/train_vs_megatron.py --model models/SmolLM2-135M-Instruct

Both steps have the same model, micro-batches, schedule and optimizer, and run in turns. Megatron's
step computes the vocabulary-parallel cross-entropy of every token and masks the prompts. ESPO's
step computes log-probs and entropies of the response tokens, then groups, ratios and metrics.
"""

import argparse
import random
from statistics import median

import torch
from measure import ROOT, seconds

from megatron_espo.config import load_config
from megatron_espo.config.checks import check_model
from megatron_espo.data.packing import TrainSequence, batch_totals, pack
from megatron_espo.distributed import runtime as distributed_runtime


def make_sequences(args: argparse.Namespace, vocab_size: int) -> list[TrainSequence]:
    draw = random.Random(1)

    def ids(count: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(count)]

    return [
        TrainSequence(ids(args.prompt), ids(args.response), [-2.0] * args.response, (-1.0) ** i)
        for i in range(args.responses)
    ]


def gpt_forward_step(data_iterator, model):
    """Megatron's own loss: the sum over the response tokens, and their number."""
    from megatron_espo.megatron.forward_step import _sequence_parameters

    batch = next(data_iterator).to(torch.device(torch.cuda.current_device()))
    labels, mask = torch.zeros_like(batch.tokens), torch.zeros_like(batch.tokens, dtype=torch.float)
    labels[0, batch.logit_positions] = batch.targets
    mask[0, batch.logit_positions] = 1.0
    output = model(
        input_ids=batch.tokens,
        position_ids=batch.position_ids,
        attention_mask=None,
        labels=labels,
        packed_seq_params=_sequence_parameters(batch),
    )

    def loss(output: torch.Tensor):
        return (output.float() * mask).sum(), mask.sum().int(), {}

    return output, loss


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--responses", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=128, help="tokens of a response")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("settings", nargs="*", help="such as model.dtype=bfloat16")
    args = parser.parse_args()
    overrides = [f"model.path={args.model}", f"megatron.tensor_model_parallel_size={args.tensor}"]
    overrides += ["algorithm.num_mini_batches=1", *args.settings]
    config = load_config(str(ROOT / "examples/quickstart.yaml"), overrides)
    spec = check_model(config)
    runtime = distributed_runtime.initialize(tensor_model_parallel_size=args.tensor)
    from megatron_espo.megatron.actor import packing_spec
    from megatron_espo.megatron.forward_step import make_forward_step
    from megatron_espo.megatron.model import build_configured
    from megatron_espo.megatron.train_engine import TrainEngine
    from megatron_espo.weights.hf_io import load_hf_weights

    chunks = build_configured(config, spec, runtime.groups)
    load_hf_weights(chunks, spec, args.model, runtime.groups)
    engine = TrainEngine(chunks, runtime.groups, config.optimizer, train_steps=100)
    sequences = make_sequences(args, spec.vocab_size)
    tokens = args.responses * args.response
    totals = batch_totals(sequences, num_responses=len(sequences), num_response_tokens=tokens)
    batches = pack(sequences, totals, packing_spec(config.megatron, runtime.groups))
    espo = make_forward_step(config.algorithm, groups=runtime.groups, vocab_size=spec.vocab_size)
    steps = {"Megatron's loss": gpt_forward_step, "ESPO": espo}
    rounds = []
    for number in range(args.rounds + 1):
        names = list(steps) if number % 2 else list(steps)[::-1]
        times = {n: seconds(lambda name=n: engine.step(steps[name], batches)) for n in names}
        rounds.append(times["ESPO"] / times["Megatron's loss"])
        if runtime.is_main and number:  # the first round warms up
            both = ", ".join(f"{name} {times[name]:.2f} s" for name in steps)
            print(f"round {number}: {both}, ratio {rounds[-1]:.3f}", flush=True)
    if runtime.is_main:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        place = f"{runtime.world_size} ranks, TP {args.tensor}, {device}"
        print(f"{place}, {tokens} response tokens: median ratio {median(rounds[1:]):.3f}")
    distributed_runtime.shutdown()


if __name__ == "__main__":
    main()
