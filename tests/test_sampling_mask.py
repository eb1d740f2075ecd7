"""Top-p and top-k: the ids that the engine kept, and log-probs over them in the trainer."""

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
from transformers import LlamaForCausalLM

from tests.support.distributed import run_ranks
from tests.support.real_engine import (
    TEMPERATURE,
    engine_config,
    reference_logprobs,
    running_engine,
    sample,
)
from tests.support.tiny import save_tiny_model

VOCAB = 131
PROMPTS = [tuple(range(3, 3 + length)) for length in (4, 7, 12)]


def kept_of_transformers(model, prompt, response, top_p: float, top_k: int) -> list[set[int]]:
    """The ids that top-k, then top-p keep for each response token, from the definition."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    kept = []
    for row in (logits.double() / TEMPERATURE).softmax(-1):
        order = row.argsort(descending=True)[: top_k or None]
        shares = row[order] / row[order].sum()
        before = shares.cumsum(0) - shares
        kept.append(set(order[before < top_p].tolist()))
    return kept


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """A model's folder and what a real engine sampled from it, by setting."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), vocab_size=VOCAB)
    config = engine_config(
        folder, tmp_path_factory.mktemp("engine"), load_weights=True, sampling_masks=True
    )
    settings = {
        "top_p": {"top_p": 0.9},
        "top_k": {"top_k": 20},
        "both": {"top_p": 0.9, "top_k": 20},
        "off": {},
        "greedy": {"temperature": 0.0},
    }
    with running_engine(config) as engine:
        found = {name: sample(engine, PROMPTS, 4, **given) for name, given in settings.items()}
    return folder, found


@pytest.mark.parametrize(
    "name, top_p, top_k", [("top_p", 0.9, 0), ("top_k", 1.0, 20), ("both", 0.9, 20)]
)
def test_the_engine_returns_the_ids_that_it_kept(sampled, name, top_p, top_k):
    folder, found = sampled
    model, sizes = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), set()
    for prompt, group in zip(PROMPTS, found[name], strict=True):
        for one in group:
            response, mask = one.token_ids.tolist(), one.sampling_mask
            ends = mask.counts.cumsum()[:-1]
            kept = [set(ids.tolist()) for ids in np.split(mask.ids, ends)]
            assert kept == kept_of_transformers(model, prompt, response, top_p, top_k)
            assert all(token in ids for token, ids in zip(response, kept, strict=True))
            sizes |= set(mask.counts.tolist())
    assert sizes == {20} if name == "top_k" else len(sizes) > 3


def test_other_requests_to_the_same_engine_are_not_truncated(sampled):
    """The canary samples from the whole vocabulary, an evaluation at temperature 0 is greedy."""
    folder, found = sampled
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, (one, *_), (greedy, *_) in zip(PROMPTS, found["off"], found["greedy"], strict=True):
        assert one.sampling_mask is None and greedy.sampling_mask is None
        expected = reference_logprobs(model, prompt, one.token_ids.tolist())
        np.testing.assert_allclose(one.logprobs, expected, atol=1e-4)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *greedy.token_ids]])).logits[0]
        assert greedy.token_ids.tolist() == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("ranks", [1, 2])
def test_log_probs_of_the_trainer_equal_those_of_the_engine(sampled, ranks):
    """With tensor parallelism of 1 and 2 ranks, in float32."""
    folder, found = sampled
    responses = [
        [prompt, one.token_ids.tolist(), one.logprobs.tolist(), mask.ids.tolist(),
         mask.counts.tolist()]
        for name in ("top_p", "top_k", "both")
        for prompt, group in zip(PROMPTS, found[name], strict=True)
        for one in group
        for mask in [one.sampling_mask]
    ]  # fmt: skip
    gap = run_ranks(
        ranks,
        "tests.support.ranks.sampling_mask:largest_gap",
        folder=str(folder),
        temperature=TEMPERATURE,
        responses=responses,
        tensor_model_parallel_size=ranks,
    )
    assert gap <= 1e-4
