"""The trainer's log-probs of sampled responses, over the ids that the engine kept."""

from types import SimpleNamespace

import numpy as np

from megatron_espo.config import Algorithm, Megatron, Optimizer, Rollout
from megatron_espo.data.packing import TrainSequence, batch_totals, pack
from megatron_espo.distributed import runtime
from megatron_espo.errors import InputError
from megatron_espo.types import SamplingMask
from tests.support.weights_models import load_spec


def largest_gap(folder: str, temperature: float, responses: list[list], **sizes: int) -> float:
    """Largest |engine - trainer| log-prob difference over all tokens, in nats.

    Args:
        responses: prompt ids, response ids, log-probs, and ids and counts of the sampling mask.
    """
    place = runtime.initialize(**sizes)
    from megatron_espo.megatron.actor import Actor, packing_spec
    from megatron_espo.megatron.forward_step import make_forward_step
    from megatron_espo.megatron.model import build_model
    from megatron_espo.megatron.train_engine import TrainEngine
    from megatron_espo.weights.hf_io import load_hf_weights

    spec, megatron = load_spec(folder), Megatron(**sizes)
    chunks = build_model(spec, megatron, place.groups)
    load_hf_weights(chunks, spec, folder, place.groups)
    settings = Optimizer(use_distributed_optimizer=False)
    policy = TrainEngine(chunks, place.groups, settings, train_steps=1)
    sequences = [
        TrainSequence(prompt, ids, logprobs, 1.0, sampling_mask=SamplingMask(*mask))
        for prompt, ids, logprobs, *mask in responses
    ]
    options = {"groups": place.groups, "vocab_size": spec.vocab_size, "temperature": temperature}
    step = make_forward_step(Algorithm(), **options)
    totals = batch_totals(sequences, num_responses=1, num_response_tokens=1)
    batches = pack(sequences, totals, packing_spec(megatron, place.groups))
    scored = policy.score(step, batches)
    gaps = [b.rollout_logprob - p for b, (p, _) in zip(batches, scored, strict=True)]
    if place.is_main:
        _check_settings(Actor, sequences)
    return max(float(gap.abs().max()) for gap in gaps)


def _check_settings(actor, sequences: list[TrainSequence]) -> None:
    """Masks of rollouts that do not match the settings are an error."""
    for top_k, given in ((0, sequences), (20, [TrainSequence([1], [2], np.zeros(1), 1.0)])):
        config = SimpleNamespace(algorithm=Algorithm(), rollout=Rollout(top_k=top_k))
        try:
            actor._pack(SimpleNamespace(config=config), given)
        except InputError as error:
            assert "rollout.top_k, got" in str(error)
        else:
            raise AssertionError(f"top_k {top_k}: no error")
