"""The gradient of a whole step through Megatron against the dense float64 reference; runs on every rank."""

import random

import torch

from megatron_espo.config import Algorithm, Optimizer
from megatron_espo.data.packing import TrainSequence, batch_totals, pack
from megatron_espo.mcore import runtime
from tests import reference

TEMPERATURE = 0.7
NUM_RESPONSES = 10  # of which eight have an advantage


def make_batch(vocab_size: int):
    """Eight (prompt, response, advantage) triples, responses from one token on."""
    draw = random.Random(3)
    lengths = [1, 2, 5, 7, 11, 4, 3, 9]
    return [
        ([draw.randrange(vocab_size) for _ in range(3 + i % 3)], [draw.randrange(vocab_size) for _ in range(n)], draw.uniform(-2, 2))
        for i, n in enumerate(lengths)
    ]


def check_gradient(folder: str, old_folder: str | None = None, max_tokens: int = 24, **sizes) -> dict[str, float]:
    """Worst relative difference over all tensors, and the tensor's name."""
    place = runtime.initialize(**{k: v for k, v in sizes.items() if k in runtime.PARALLEL_SIZES}, seed=1)
    from megatron_espo.mcore.forward_step import make_forward_step
    from megatron_espo.mcore.model import Layout, build_model, read_hf_config
    from megatron_espo.mcore.optimizer import Policy
    from megatron_espo.weights.hf_io import load_hf_weights

    hf_config = read_hf_config(folder)
    chunks = build_model(hf_config, Layout(**sizes), place.groups)
    load_hf_weights(chunks, hf_config, old_folder or folder, place.groups)
    # All-reduced (not scattered) gradients, so that each rank can show the whole of its shard.
    policy = Policy(chunks, place.groups, Optimizer(use_distributed_optimizer=False), train_steps=1)
    batch = make_batch(hf_config["vocab_size"])
    sequences = [TrainSequence(p, r, [0.0] * len(r), a) for p, r, a in batch]
    micro_batches = pack(
        sequences,
        batch_totals(sequences, num_responses=NUM_RESPONSES, num_response_tokens=99),
        data_parallel_rank=place.groups.dp.rank(),
        data_parallel_size=place.groups.dp.size(),
        max_tokens=max_tokens,
        multiple_of=sizes.get("tensor_model_parallel_size", 1) if sizes.get("sequence_parallel") else 1,
    )
    step = make_forward_step(
        Algorithm(), groups=place.groups, vocab_size=hf_config["vocab_size"], temperature=TEMPERATURE
    )
    if old_folder:
        from dataclasses import replace

        scored = policy.score(step, micro_batches)
        if scored:
            micro_batches = [
                replace(b, old_logprob=o, annotation=a) for b, (o, a) in zip(micro_batches, scored, strict=True)
            ]
        load_hf_weights(chunks, hf_config, folder, place.groups)
    policy.backward(step, micro_batches)
    return compare(folder, old_folder, batch, hf_config, gathered_gradients(chunks, hf_config, place.groups))


def gathered_gradients(chunks, hf_config, groups) -> dict[str, torch.Tensor]:
    """Whole gradients under Hugging Face names: the weight source, over parameters that hold their gradients."""
    from megatron_espo.weights.source import MegatronWeightSource

    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.main_grad)
    return dict(MegatronWeightSource(chunks, hf_config, groups, dtype=torch.float32, all_replicas=True))


def compare(folder, old_folder, batch, hf_config, found) -> dict[str, float]:
    """Against the dense reference in float64."""
    from transformers import AutoModelForCausalLM

    def load(path):
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager")

    model = load(folder)
    loss = reference.espo_loss(
        model,
        batch,
        num_responses=NUM_RESPONSES,
        temperature=TEMPERATURE,
        vocab_size=hf_config["vocab_size"],
        old_model=load(old_folder) if old_folder else None,
    )
    expected = reference.gradients(model, loss)
    assert expected.keys() == found.keys(), expected.keys() ^ found.keys()
    assert all(gradient.norm() > 0 for gradient in expected.values()), "a reference gradient is zero: nothing was compared"
    differences = {n: float((found[n].double() - g).norm() / g.norm()) for n, g in expected.items()}
    return {"worst": max(differences.values()), "tensor": max(differences, key=differences.get)}
