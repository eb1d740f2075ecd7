"""The recorded batch: prompts, responses, advantages, and an old policy unlike the model's."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_espo.algo import LossInputs, load_objective
from megatron_espo.config import Algorithm
from megatron_espo.data.packing import TrainSequence
from megatron_espo.models.registry import read_spec
from megatron_espo.models.spec import ModelSpec
from megatron_espo.tools.parity.cases import OBJECTIVES

SEED = 5
# Mean changes of a response's log-probs: inside GSPO's bounds, inside ESPO's, outside GRPO's.
DRIFTS = (3e-4, 5e-3, 0.5)
# Rounding may clip a ratio this close to its bound (in log-probs) in one layout only.
MARGIN = 2e-5
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 517,
    "max_position_embeddings": 256,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
}
# Small models with grouped queries, experts, and a vocabulary of 11 x 47 that needs padding.
MODELS: dict[str, ModelSpec] = {
    "dense": read_spec(SIZES | {"architectures": ["Qwen3ForCausalLM"]}),
    "moe": read_spec(SIZES | EXPERTS | {"architectures": ["Qwen3MoeForCausalLM"]}),
}


def write_model(folder: Path, spec: ModelSpec) -> None:
    """Write a Hugging Face folder of random float32 weights, without a tokenizer."""
    draw = torch.Generator().manual_seed(SEED)
    folder.mkdir(parents=True, exist_ok=True)
    # Norm weights are near 1; matrices are large enough for a policy that is not uniform.
    tensors = {
        name: torch.randn(shape, generator=draw) * 0.2 + (len(shape) == 1)
        for name, shape in spec.tensor_shapes.items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(spec.hf_config, indent=2), encoding="utf-8")


def make_sequences(vocab_size: int, max_tokens: int) -> list[TrainSequence]:
    """Fourteen random responses of 1 to ``max_tokens // 4`` tokens to four prompts."""
    draw = random.Random(SEED)
    prompts: list[Any] = [[draw.randrange(vocab_size) for _ in range(n)] for n in (1, 5, 9, 12)]
    longest = min(40, max_tokens // 4)
    lengths = [1, 2, longest, *(draw.randint(1, longest) for _ in range(11))]
    responses: list[Any] = [[draw.randrange(vocab_size) for _ in range(n)] for n in lengths]
    logprobs: list[Any] = [[-1.0] * length for length in lengths]
    advantages = [draw.choice((-1, 1)) * draw.uniform(0.2, 2) for _ in responses]
    rows = zip(cycle(prompts), responses, logprobs, advantages, strict=False)
    return [TrainSequence(*row) for row in rows]


def drift(
    sequences: Sequence[TrainSequence], scored: Sequence[torch.Tensor], vocab_size: int
) -> list[TrainSequence]:
    """Give each response old log-probs unlike the model's, with no ratio near a clip bound.

    Args:
        scored: ``[2, response_tokens]`` log-probs and entropies of the model, for each response.
    """
    draw = random.Random(SEED + 1)
    drifted = []
    for sequence, values, scale in zip(sequences, scored, cycle(DRIFTS), strict=False):
        new, entropy = values[0], values[1].clamp(min=0)
        for _ in range(1000):
            lean = draw.uniform(-1, 1)
            moves = torch.tensor([lean + draw.uniform(-1, 1) for _ in new], dtype=torch.float64)
            old = (new + scale * moves).clamp(max=-1e-6).float()
            if not _on_edge(new, old, entropy, sequence.advantage, vocab_size):
                break
        else:
            raise AssertionError("no old policy found for a response")
        drifted.append(replace(sequence, old_logprobs=old.numpy(), old_entropies=entropy.numpy()))
    return drifted


def _on_edge(
    new: torch.Tensor, old: torch.Tensor, entropy: torch.Tensor, advantage: float, vocab_size: int
) -> bool:
    """Whether a shift of all log-probs by ``MARGIN`` changes the clipped tokens of an objective."""
    counts = {"vocab_size": vocab_size, "num_responses": 1, "num_tokens": len(new)}
    for name in OBJECTIVES:
        objective = load_objective(Algorithm(objective=name))
        segments = objective.segment_tokens(entropy, torch.tensor([len(new)]), **counts)
        lower, upper = (
            objective.loss(
                LossInputs(logprob.clamp(max=0), old, torch.full_like(old, advantage), segments)
            )
            for logprob in (new - MARGIN, new + MARGIN)
        )
        if not torch.equal(lower.no_gradient, upper.no_gradient):
            return True
    return False
