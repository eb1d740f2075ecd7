"""The gradient of a step through Megatron against dense float64; runs on every rank."""

import random
from dataclasses import replace
from functools import cache, partial

import numpy as np
import torch
import torch.distributed as dist

from megatron_espo.config import Algorithm, Megatron, Optimizer
from megatron_espo.data.packing import TrainSequence, batch_totals, pack
from megatron_espo.distributed import runtime
from megatron_espo.models.mapping import EXPERT_BIAS
from megatron_espo.types import SamplingMask
from tests.support import reference
from tests.support.weights_models import load_spec, per_expert

TEMPERATURE = 0.7
NUM_RESPONSES = 10  # of which eight have an advantage
MASK_SEED = 1


def make_batch(vocab_size: int):
    """Eight (prompt, response, advantage) triples for three prompts; some have one token."""
    # With this seed, entropies at the boundary of a group differ by more than float32 rounding.
    draw = random.Random(6)
    lengths = [1, 2, 5, 7, 11, 4, 3, 9]
    prompts = [[draw.randrange(vocab_size) for _ in range(length)] for length in (4, 1, 5)]
    return [
        (prompts[i // 3], [draw.randrange(vocab_size) for _ in range(n)], draw.uniform(-2, 2))
        for i, n in enumerate(lengths)
    ]


def engine_logprobs(responses: list[list[int]]) -> list[list[float]]:
    """Random log-probs of the rollout engine."""
    draw = random.Random(8)
    return [[draw.uniform(-6, -3) for _ in response] for response in responses]


def make_masks(batch) -> list[list[bool]]:
    """Which response tokens the policy sampled, over several turns; all of response 3."""
    draw = random.Random(MASK_SEED)
    masks = []
    for number, (_, response, _) in enumerate(batch):
        mask = [draw.random() < 0.6 or number == 3 for _ in response]
        mask[draw.randrange(len(mask))] = True
        masks.append(mask)
    return masks


def engine_experts(batch, spec) -> list[np.ndarray]:
    """Random experts of the rollout engine, equal for equal prompts but for the last token."""
    experts, draw = spec.experts, np.random.default_rng(9)

    def choose(tokens: int) -> np.ndarray:
        scores = draw.random((tokens, sum(experts.layers), experts.count))
        return scores.argsort(-1)[..., : experts.per_token].astype(np.uint8)

    of_prompts = {tuple(prompt): choose(len(prompt) - 1) for prompt, _, _ in batch}
    return [
        np.concatenate([of_prompts[tuple(prompt)], choose(len(response))])
        for prompt, response, _ in batch
    ]


def engine_masks(batch, vocab_size: int) -> list[list[list[int]]]:
    """For each response token eight random ids that the rollout engine kept, and its own."""
    draw = random.Random(12)
    return [
        [sorted({token, *draw.sample(range(vocab_size), 8)}) for token in response]
        for _, response, _ in batch
    ]


def build(
    folder: str,
    weights: str,
    settings: Optimizer,
    max_tokens: int,
    sizes: dict,
    algorithm: Algorithm | None = None,
    head_budget_bytes: int | None = None,
    replays: bool = False,
    masked: bool = False,
    kept: bool = False,
    dtype: str = "float32",
    **packing,
):
    """Runtime, engine, forward step, micro-batches of this rank, batch and model configuration."""
    place = runtime.initialize(
        **{k: v for k, v in sizes.items() if k in runtime.PARALLEL_SIZES}, seed=1
    )
    from megatron_espo.megatron.actor import packing_spec
    from megatron_espo.megatron.forward_step import make_forward_step
    from megatron_espo.megatron.model import build_model
    from megatron_espo.megatron.router_replay import RouterReplay
    from megatron_espo.megatron.scatter import scatter_sequences
    from megatron_espo.megatron.train_engine import TrainEngine
    from megatron_espo.weights.hf_io import load_hf_weights

    spec = load_spec(folder)
    chunks = build_model(spec, Megatron(**sizes), place.groups, dtype=getattr(torch, dtype))
    load_hf_weights(chunks, spec, weights, place.groups)
    policy = TrainEngine(
        chunks, place.groups, settings, train_steps=1, overrides=sizes.get("overrides")
    )
    batch = make_batch(spec.vocab_size)
    rollout_logprobs = engine_logprobs([r for _, r, _ in batch])
    sequences = [
        TrainSequence(p, r, logprobs, a)
        for (p, r, a), logprobs in zip(batch, rollout_logprobs, strict=True)
    ]
    if masked:  # NaN where the policy did not sample: nothing may read these values
        sequences = [
            replace(s, loss_mask=mask, rollout_logprobs=np.where(mask, s.rollout_logprobs, np.nan))
            for s, mask in zip(sequences, make_masks(batch), strict=True)
        ]
    if kept:
        sequences = [
            replace(s, sampling_mask=SamplingMask(np.concatenate(ids), [len(x) for x in ids]))
            for s, ids in zip(sequences, engine_masks(batch, spec.vocab_size), strict=True)
        ]
    settings_of_layout = Megatron(max_tokens_per_micro_batch=max_tokens, **sizes)
    totals = batch_totals(sequences, num_responses=NUM_RESPONSES, num_response_tokens=99)
    pack_as = replace(packing_spec(settings_of_layout, place.groups), **packing)
    experts = spec.experts
    if replays:
        if dist.get_rank() == 0:
            chosen = zip(sequences, engine_experts(batch, spec), strict=True)
            sequences = [replace(sequence, routed_experts=rows) for sequence, rows in chosen]
        if dist.get_world_size() > 1:
            sequences = scatter_sequences(sequences, place.groups, pack_as.share_prompts)
    micro_batches = pack(sequences, totals, pack_as)
    step = make_forward_step(
        algorithm or Algorithm(),
        groups=place.groups,
        vocab_size=spec.vocab_size,
        temperature=TEMPERATURE,
        head_budget_bytes=head_budget_bytes,
        router_replay=RouterReplay(chunks, experts, place.groups.tp) if replays else None,
    )
    return place, policy, step, micro_batches, batch, spec


def check_gradient(
    folder: str,
    old_folder: str | None = None,
    max_tokens: int = 24,
    packing: dict | None = None,
    replays: bool = False,
    masked: bool = False,
    kept: bool = False,
    algorithm: dict | None = None,
    dtype: str = "float32",
    **sizes,
) -> dict[str, float]:
    """Rank 0: worst relative difference of the gradient over all tensors, and the tensor's name."""
    # All-reduced gradients: each rank has the whole gradient of its shard.
    settings = Optimizer(use_distributed_optimizer=False)
    place, policy, step, micro_batches, batch, spec = build(
        folder,
        old_folder or folder,
        settings,
        max_tokens,
        sizes,
        Algorithm(**algorithm or {}),
        replays=replays,
        masked=masked,
        kept=kept,
        dtype=dtype,
        **packing or {},
    )
    if old_folder:
        from megatron_espo.weights.hf_io import load_hf_weights

        scored = policy.score(step, micro_batches)
        if scored:
            micro_batches = [
                replace(b, old_logprob=p, old_entropy=e)
                for b, (p, e) in zip(micro_batches, scored, strict=True)
            ]
        load_hf_weights(policy.chunks, spec, folder, place.groups)
    if sizes.get("overrides"):
        # Megatron overlaps from the second batch on, also if that has fewer micro-batches.
        policy.backward(step, [*micro_batches, *micro_batches])
    ticks: list[None] = []
    policy.backward(step, micro_batches, lambda: ticks.append(None))
    assert len(ticks) == len(micro_batches)
    found = gathered_gradients(policy.chunks, spec, place.groups)
    if dist.get_rank():  # only rank 0 computes the reference
        return {}
    expected = reference_gradients(folder, old_folder, replays, masked, kept, bool(algorithm))
    return compare(expected, found)


def check_regularized_gradient(
    folder: str,
    reference_folder: str,
    algorithm: dict,
    replays: bool = False,
    masked: bool = False,
    **sizes,
) -> dict[str, float]:
    """The gradient with rollout correction, KL penalty and entropy bonus."""
    from transformers import AutoModelForCausalLM

    from megatron_espo.megatron.reference import ReferencePolicy
    from megatron_espo.weights.hf_io import load_hf_weights

    settings = Optimizer(use_distributed_optimizer=False)
    place, policy, step, micro_batches, batch, spec = build(
        folder,
        reference_folder,
        settings,
        24,
        sizes,
        Algorithm(**algorithm),
        replays=replays,
        masked=masked,
    )
    frozen = ReferencePolicy(policy.chunks)
    load_hf_weights(policy.chunks, spec, folder, place.groups)
    with frozen.swapped_in():
        scored = policy.score(step, micro_batches)
    if scored:
        micro_batches = [
            replace(b, reference_logprob=p) for b, (p, _) in zip(micro_batches, scored, strict=True)
        ]
    policy.backward(step, micro_batches)
    found = gathered_gradients(policy.chunks, spec, place.groups)
    if dist.get_rank():
        return {}
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, **eager)
        for path in (folder, reference_folder)
    ]
    loss = reference.espo_loss(
        models[0],
        batch,
        num_responses=NUM_RESPONSES,
        temperature=TEMPERATURE,
        vocab_size=spec.vocab_size,
        reference_model=models[1],
        rollout_logprobs=engine_logprobs([r for _, r, _ in batch]),
        routed_experts=engine_experts(batch, spec) if replays else None,
        masks=make_masks(batch) if masked else None,
        **algorithm,
    )
    return compare(per_expert(reference.gradients(models[0], loss)), found)


def check_update(folder: str, **sizes) -> dict[str, float]:
    """The change of the weights by one step of Megatron's distributed optimizer.

    Adam's first update is ``-lr g / (|g| + eps)``; with ``eps = 1`` it is smooth in ``g``.
    """
    from megatron_espo.weights.source import WeightGatherer

    settings = Optimizer(lr=1.0, adam_eps=1.0, clip_grad=0.0, weight_decay=0.0)
    place, policy, step, micro_batches, batch, spec = build(folder, folder, settings, 24, sizes)

    def weights() -> dict[str, torch.Tensor]:
        source = WeightGatherer(
            policy.chunks, spec, place.groups, dtype=torch.float32, all_replicas=True
        )
        return {name: tensor.double() for name, tensor in source}

    before = weights()
    policy.step(step, micro_batches)
    change = {name: tensor - before[name] for name, tensor in weights().items()}
    biases = [change.pop(name) for name in list(change) if name.endswith(EXPERT_BIAS)]
    assert not any(bias.any() for bias in biases), "the bias of a router changed"
    if dist.get_rank():
        return {}
    gradients = reference_gradients(folder)
    return compare({name: -g / (g.abs() + 1.0) for name, g in gradients.items()}, change)


def gathered_gradients(chunks, spec, groups) -> dict[str, torch.Tensor]:
    """Whole gradients under Hugging Face names, through the weight source."""
    from megatron_espo.weights.source import WeightGatherer

    for chunk in chunks:
        for parameter in filter(lambda p: p.requires_grad, chunk.parameters()):
            parameter.data.copy_(parameter.main_grad)
    source = WeightGatherer(chunks, spec, groups, dtype=torch.float32, all_replicas=True)
    return {name: tensor for name, tensor in source if not name.endswith(EXPERT_BIAS)}


@cache
def reference_gradients(
    folder: str,
    old_folder: str | None = None,
    replays: bool = False,
    masked: bool = False,
    kept: bool = False,
    vespo: bool = False,
) -> dict[str, torch.Tensor]:
    """The dense float64 gradient, the same in all layouts."""
    from transformers import AutoModelForCausalLM

    def load(path):
        eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, **eager)

    spec = load_spec(folder)
    batch = make_batch(spec.vocab_size)
    formula = reference.vespo_loss if vespo else reference.espo_loss
    if kept:
        formula = partial(formula, kept=engine_masks(batch, spec.vocab_size))
    model = load(folder)
    loss = formula(
        model,
        batch,
        num_responses=NUM_RESPONSES,
        temperature=TEMPERATURE,
        vocab_size=spec.vocab_size,
        old_model=load(old_folder) if old_folder else None,
        routed_experts=engine_experts(batch, spec) if replays else None,
        masks=make_masks(batch) if masked else None,
    )
    return per_expert(reference.gradients(model, loss))


def compare(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> dict[str, float]:
    """Worst relative difference (L2) over the tensors."""
    assert expected.keys() == found.keys(), expected.keys() ^ found.keys()
    assert all(tensor.norm() > 0 for tensor in expected.values()), (
        "a gradient of the reference is zero"
    )
    differences = {
        n: float((found[n].cpu().double() - g).norm() / g.norm()) for n, g in expected.items()
    }
    return {"worst": max(differences.values()), "tensor": max(differences, key=differences.get)}


def check_all(cases: list[list]) -> list[dict[str, float]]:
    """Run each ``[name of a check, arguments]`` in its layout."""
    return [globals()[check](**arguments) for check, arguments in cases]
