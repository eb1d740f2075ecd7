"""The engine's choice of experts: which they are, and how they are kept on disk."""

import asyncio
import random

import aiohttp
import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
from transformers import AutoModelForCausalLM

from megatron_espo.batch import ScoredGroups
from megatron_espo.errors import InputError
from megatron_espo.rollout.engine import EngineError, Generation, Phase
from megatron_espo.rollout.pool import concatenate
from megatron_espo.rollout.server import read_key, run_key_file
from megatron_espo.rollout_log import RolloutLog
from megatron_espo.types import Prompt, Trajectory
from tests.real_engine import engine_config, running_engine, sample
from tests.tiny import WORDS, save_tiny_model

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Three layers, of which the middle one is dense."""
    return save_tiny_model(tmp_path_factory.mktemp("moe"), "qwen3_moe", num_hidden_layers=3, mlp_only_layers=[1], **EXPERTS)


def choices_of_transformers(reference, tokens: list[int], top_k: int) -> torch.Tensor:
    """``[tokens, layers with experts, top_k]`` experts that transformers' routers choose, sorted."""
    with torch.no_grad():
        logits = reference(torch.tensor([tokens]), output_router_logits=True).router_logits
    return torch.stack(logits, 1)[:-1].topk(top_k).indices.sort(-1).values


def make_prompts(seed: int) -> list[tuple[int, ...]]:
    """90 prompts of 60 tokens; every ninth begins as the first."""
    draw = random.Random(seed)
    prompts = [tuple(draw.randrange(4, len(WORDS)) for _ in range(60)) for _ in range(90)]
    prompts[1::9] = [prompts[0][:40] + prompt[40:] for prompt in prompts[1::9]]
    return prompts


def server_metric(engine, name: str) -> float:
    """Sum of a Prometheus counter of the server."""

    async def text() -> str:
        connector = aiohttp.UnixConnector(engine.address.removeprefix("unix:"))
        headers = {"Authorization": f"Bearer {read_key(run_key_file(engine.config.folder))}"}
        async with aiohttp.ClientSession("http://engine", connector=connector, headers=headers) as session, session.get("/metrics") as response:
            return await response.text()

    lines = [line for line in asyncio.run(text()).splitlines() if line.startswith(name)]
    assert lines, name
    return sum(float(line.rpartition(" ")[2]) for line in lines)


@pytest.mark.parametrize("tensor_parallel_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_engine_returns_the_experts_that_its_router_chose(model, tmp_path, tensor_parallel_size):
    """In float32 those of transformers, for tokens that another request computed, for prompts computed in pieces, and after preemptions."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sizes = reference.config
    token_bytes = 2 * sizes.num_hidden_layers * sizes.num_key_value_heads * sizes.head_dim * 4 // tensor_parallel_size
    # The cache holds 160 blocks of 32 tokens. 90 responses need three each, less what prompts share.
    limits = {"kv_cache_memory_bytes": 160 * 32 * token_bytes, "disable_log_stats": False}
    pieces = {"enable_chunked_prefill": True, "max_num_batched_tokens": 500}
    wrong = compared = 0
    for arguments, seeded in ((limits, True), (limits | pieces, False)):
        config = engine_config(
            model, tmp_path, load_weights=True, routed_experts=True, tensor_parallel_size=tensor_parallel_size, engine_args=arguments
        )
        with running_engine(config) as engine:
            prompts = make_prompts(4 + seeded)
            groups = sample(engine, prompts, routed_experts=True, **({} if seeded else {"temperature": 0.0}))
            ((again,),) = sample(engine, prompts[:1], routed_experts=True)
            ((without,),) = sample(engine, prompts[:1])
            assert without.routed_experts is None and server_metric(engine, "vllm:prefix_cache_hits_total") > 0
            if seeded:
                assert server_metric(engine, "vllm:num_preemptions_total") >= 10
        for ids, found in [*((ids, group[0]) for ids, group in zip(prompts, groups, strict=True)), (prompts[0], again)]:
            expected = choices_of_transformers(reference, [*ids, *found.token_ids.tolist()], 2)
            chosen = torch.from_numpy(found.routed_experts.astype("int64")).sort(-1).values
            assert found.routed_experts.dtype == np.uint8 and chosen.shape == expected.shape
            wrong += int((chosen != expected).any(-1).sum())
            compared += chosen[..., 0].numel()
    assert wrong == 0 and compared > 20000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_vllms_own_record_on_a_gpu(model, tmp_path):
    """Written against vLLM 0.32's ``enable_return_routed_experts``; near-ties may fall either way there."""
    reference, same = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), []
    prompts = make_prompts(1)[:8]
    with running_engine(engine_config(model, tmp_path, load_weights=True, routed_experts=True, engine_args={})) as engine:
        groups = sample(engine, prompts, 4, routed_experts=True)
    for ids, group in zip(prompts, groups, strict=True):
        for found in group:
            own = choices_of_transformers(reference, [*ids, *found.token_ids.tolist()], 2)
            chosen = torch.from_numpy(found.routed_experts.astype("int64")).sort(-1).values
            assert chosen.shape == own.shape
            same.append((chosen == own).all(-1).float().mean())
    assert torch.stack(same).mean() > 0.98


@pytest.mark.slow
def test_an_engine_whose_model_has_no_routers_does_not_start(tmp_path):
    dense = save_tiny_model(tmp_path / "dense")
    with pytest.raises(EngineError, match="No supported MoE router found") as caught:
        with running_engine(engine_config(dense, tmp_path, load_weights=True, routed_experts=True)):
            pass
    assert caught.value.phase == Phase.START


def make_groups(with_experts: bool) -> ScoredGroups:
    draw = np.random.default_rng(1)

    def rollout(number: int, length: int) -> Trajectory:
        experts = draw.integers(0, 256, (3 + length - 1, 2, 4), dtype=np.uint8) if with_experts else None
        return Trajectory.single_turn(Prompt(f"p{number}", "", "", (1, 2, 3)), (5,) * length, (-1.0,) * length, 0, "stop", "", experts)

    return ScoredGroups([[rollout(i, 1 + i), rollout(i, 4)] for i in range(3)], torch.zeros(3, 2), 3)


def test_recorded_rollouts_keep_their_experts(tmp_path):
    log, groups = RolloutLog(tmp_path, {}), make_groups(True)
    log.write(7, groups, before={}, after={"at": 3})
    recorded = log.read(7, {})
    assert recorded.groups.rollouts == groups.rollouts
    samples = sum(groups.rollouts, [])
    for one, other in zip(samples, sum(recorded.groups.rollouts, []), strict=True):
        assert one.routed_experts.dtype == other.routed_experts.dtype == np.uint8
        assert np.array_equal(one.routed_experts, other.routed_experts)
    path = tmp_path / "step_000007.npz"
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(samples[2].routed_experts.tobytes()) + 5] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="step_000007.npz: expected recorded rollouts, found damage .*routed_experts.npy"):
        log.read(7, {})
    assert log.read(7, {"elsewhere": 1}) is None
    log.forget(7)
    assert not list(tmp_path.iterdir())


def test_rollouts_without_experts_and_pickled_copies_have_none(tmp_path):
    import pickle

    log = RolloutLog(tmp_path, {})
    log.write(1, make_groups(False), before={}, after={})
    assert not log.read(1, {}).groups.have_routed_experts
    groups = make_groups(True)
    sent = pickle.loads(pickle.dumps(groups))
    assert groups.have_routed_experts and not sent.have_routed_experts
    assert sent.rollouts == groups.rollouts and sent.dispatched == 3


def test_a_continued_response_keeps_the_experts_that_sampled_its_tokens():
    def generation(tokens: int, experts: np.ndarray | None) -> Generation:
        return Generation(np.zeros(tokens, np.int32), np.zeros(tokens, np.float32), np.zeros(tokens, np.int32), "stop", experts)

    earlier, now = np.zeros((5, 2, 2), np.uint8), np.ones((9, 2, 2), np.uint8)
    assert concatenate(generation(3, earlier), generation(4, now)).routed_experts[:, 0, 0].tolist() == [0] * 5 + [1] * 4
    assert concatenate(None, generation(4, now)).routed_experts is now
    assert concatenate(generation(3, None), generation(4, None)).routed_experts is None
