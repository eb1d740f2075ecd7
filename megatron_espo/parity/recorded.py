"""The batch that every layout is given: prompts, responses, advantages, and an old policy some way off the model's."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from megatron_espo.algo import annotate, policy_loss
from megatron_espo.config import Algorithm
from megatron_espo.data.packing import TrainSequence
from megatron_espo.parity.cases import OBJECTIVES
from megatron_espo.weights.families import model_groups

SEED = 5
# Mean sizes of the change of a response's log-probs: inside GSPO's bounds, inside ESPO's, beyond GRPO's.
DRIFTS = (3e-4, 5e-3, 0.5)
# A ratio this close to its bound (in log-probs) could be clipped in one layout and not in another, by rounding alone.
MARGIN = 2e-5
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 517,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": SIZES | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    "moe": SIZES
    | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}
"""Small models with everything that a layout can cut wrong: grouped queries, a vocabulary of 11 x 47, experts."""


def write_model(folder: Path, hf_config: dict[str, Any]) -> None:
    """A Hugging Face folder of random float32 weights (no tokenizer)."""
    draw = torch.Generator().manual_seed(SEED)
    folder.mkdir(parents=True)
    tensors = {}
    for group in model_groups(hf_config):
        for mapping in group:
            for name, shape in mapping.huggingface:
                # Norm weights lie around 1; matrices are large enough for a policy that is not uniform.
                tensors[name] = torch.randn(shape, generator=draw) * 0.2 + (len(shape) == 1)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf_config, indent=2))


def make_sequences(vocab_size: int, max_tokens: int) -> list[TrainSequence]:
    """Fourteen responses of 1 to ``max_tokens // 4`` random tokens to four prompts, one of a single token."""
    draw = random.Random(SEED)
    prompts = [[draw.randrange(vocab_size) for _ in range(n)] for n in (1, 5, 9, 12)]
    longest = min(40, max_tokens // 4)
    lengths = [1, 2, longest, *(draw.randint(1, longest) for _ in range(11))]
    responses = [[draw.randrange(vocab_size) for _ in range(n)] for n in lengths]
    return [
        TrainSequence(prompts[i % 4], response, [-1.0] * len(response), draw.choice((-1, 1)) * draw.uniform(0.2, 2))
        for i, response in enumerate(responses)
    ]


def drift(
    sequences: Sequence[TrainSequence],
    logprobs: Sequence[Sequence[float]],
    entropies: Sequence[Sequence[float]],
    vocab_size: int,
) -> list[TrainSequence]:
    """Give each response an old policy that differs from the model's log-probs, with no ratio on the edge of a bound."""
    draw = random.Random(SEED + 1)
    drifted = []
    for i, (sequence, new, entropy) in enumerate(zip(sequences, logprobs, entropies, strict=True)):
        entropy = [max(0.0, value) for value in entropy]
        for _ in range(1000):
            scale, lean = DRIFTS[i % len(DRIFTS)], draw.uniform(-1, 1)
            old = [min(-1e-6, value + scale * (lean + draw.uniform(-1, 1))) for value in new]
            if not _on_edge(new, old, entropy, sequence.advantage, vocab_size):
                break
        else:
            raise AssertionError(f"no old policy found for response {i}")
        drifted.append(replace(sequence, old_logprobs=old, old_entropies=entropy))
    return drifted


def _on_edge(new, old, entropy, advantage: float, vocab_size: int) -> bool:
    """Whether moving all log-probs by ``MARGIN`` either way changes which tokens any objective clips."""
    lengths = torch.tensor([len(new)])
    old_logprob, advantages = torch.tensor(old), torch.full((len(new),), advantage)
    for objective in OBJECTIVES:
        algorithm = Algorithm(objective=objective)
        annotation = annotate(
            torch.tensor(entropy),
            lengths,
            algorithm,
            vocab_size=vocab_size,
            num_responses=1,
            num_tokens=len(new),
            max_response_tokens=None,
        )
        seen = [
            policy_loss((torch.tensor(new) + shift).clamp(max=0), old_logprob, advantages, annotation, algorithm)
            for shift in (-MARGIN, MARGIN)
        ]
        if not torch.equal(seen[0].no_gradient, seen[1].no_gradient):
            return True
    return False


def save_sequences(path: Path, sequences: Sequence[TrainSequence]) -> None:
    """Write the recorded batch as JSON."""
    path.write_text(json.dumps([asdict(sequence) for sequence in sequences], default=np.ndarray.tolist))


def load_sequences(path: Path) -> list[TrainSequence]:
    """Read what :func:`save_sequences` wrote."""
    return [TrainSequence(**entry) for entry in json.loads(path.read_text())]
