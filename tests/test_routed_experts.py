"""The experts that the engine chose for each token: their values, and how they are stored."""

import asyncio
import random

import aiohttp
import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
from transformers import AutoModelForCausalLM

from megatron_espo.data.rollout_store import RolloutLog
from megatron_espo.data.scored_groups import ScoredGroups
from megatron_espo.errors import InputError
from megatron_espo.rollout.engine import EngineError, Generation
from megatron_espo.rollout.pool import concatenate
from megatron_espo.rollout.server import run_key
from megatron_espo.types import Prompt, Trajectory
from tests.support.real_engine import engine_config, running_engine, sample
from tests.support.tiny import WORDS, save_tiny_model
from tests.support.trajectories import single_turn, values_of

EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Three layers, of which the middle one is dense."""
    return save_tiny_model(
        tmp_path_factory.mktemp("moe"),
        "qwen3_moe",
        num_hidden_layers=3,
        mlp_only_layers=[1],
        **EXPERTS,
    )


def choices_of_transformers(reference, tokens: list[int]) -> torch.Tensor:
    """``[tokens - 1, layers with experts, top_k]`` sorted experts of transformers' routers."""
    chosen: list[torch.Tensor] = []
    routers = (m for name, m in reference.named_modules() if name.endswith(".mlp.gate"))
    hooks = [m.register_forward_hook(lambda *call: chosen.append(call[-1][2])) for m in routers]
    with torch.no_grad():
        reference(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    return torch.stack(chosen, 1)[:-1].sort(-1).values


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
        headers = {"Authorization": f"Bearer {run_key(engine.config.folder)}"}
        client = aiohttp.ClientSession("http://engine", connector=connector, headers=headers)
        async with client as session, session.get("/metrics") as response:
            return await response.text()

    lines = [line for line in asyncio.run(text()).splitlines() if line.startswith(name)]
    assert lines, name
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def compare(reference, pairs) -> tuple[int, int]:
    """Wrong and compared choices of ``(prompt, generation)`` pairs."""
    wrong = compared = 0
    for ids, found in pairs:
        expected = choices_of_transformers(reference, [*ids, *found.token_ids.tolist()])
        chosen = torch.from_numpy(found.routed_experts.astype("int64")).sort(-1).values
        assert chosen.shape == expected.shape
        wrong += int((chosen != expected).any(-1).sum())
        compared += chosen[..., 0].numel()
    return wrong, compared


@pytest.mark.parametrize(
    "workers, in_pieces",
    [
        (1, False),
        pytest.param(1, True, marks=pytest.mark.slow),
        pytest.param(2, False, marks=pytest.mark.slow),
        pytest.param(2, True, marks=pytest.mark.slow),
    ],
)
def test_engine_returns_the_experts_that_its_router_chose(model, tmp_path, workers, in_pieces):
    """They are those of transformers in float32.

    Covers tokens that another request computed, preempted requests, and prompts in pieces.
    """
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sizes = reference.config
    values = 2 * sizes.num_hidden_layers * sizes.num_key_value_heads * sizes.head_dim // workers
    # The cache holds 160 blocks of 32 tokens. 90 responses need three each, less shared prompts.
    arguments = {"kv_cache_memory_bytes": 160 * 32 * 4 * values, "disable_log_stats": False}
    options = {}
    if in_pieces:  # a CPU generator cannot sample with seeds then
        arguments |= {"enable_chunked_prefill": True, "max_num_batched_tokens": 500}
        options = {"temperature": 0.0}
    config = engine_config(
        model,
        tmp_path,
        load_weights=True,
        routed_experts=True,
        expert_layers=[0, 2],
        tensor_parallel_size=workers,
        engine_args=arguments,
    )
    prompts = make_prompts(4 + in_pieces)
    with running_engine(config) as engine:
        groups = sample(engine, prompts, routed_experts=True, **options)
        ((again,),) = sample(engine, prompts[:1], routed_experts=True)
        ((without,),) = sample(engine, prompts[:1])
        assert without.routed_experts is None
        assert server_metric(engine, "vllm:prefix_cache_hits_total") > 0
        if not in_pieces:
            assert server_metric(engine, "vllm:num_preemptions_total") >= 10
    found = [group[0] for group in groups]
    assert again.routed_experts.dtype == np.uint8
    pairs = [*zip(prompts, found, strict=True), (prompts[0], again)]
    wrong, compared = compare(reference, pairs)
    assert wrong == 0 and compared > 10000


@pytest.mark.slow
def test_the_choice_of_a_router_with_a_bias_is_recorded(tmp_path):
    sizes = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    model = save_tiny_model(tmp_path / "model", "glm4_moe", tie_word_embeddings=False, **sizes)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    changes = {"load_weights": True, "routed_experts": True, "expert_layers": [1]}
    prompts = make_prompts(4)[:8]
    with running_engine(engine_config(model, tmp_path, **changes)) as engine:
        groups = sample(engine, prompts, routed_experts=True)
    pairs = zip(prompts, (group[0] for group in groups), strict=True)
    wrong, compared = compare(reference, pairs)
    assert wrong == 0 and compared > 400


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_vllms_own_record_on_a_gpu(model, tmp_path):
    """vLLM 0.32's ``enable_return_routed_experts``. A GPU may decide near-ties differently."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prompts = make_prompts(1)[:8]
    config = engine_config(
        model,
        tmp_path,
        load_weights=True,
        routed_experts=True,
        expert_layers=[0, 2],
    )
    with running_engine(config) as engine:
        groups = sample(engine, prompts, 4, routed_experts=True)
    pairs = [(ids, one) for ids, group in zip(prompts, groups, strict=True) for one in group]
    wrong, compared = compare(reference, pairs)
    assert wrong < 0.02 * compared


@pytest.mark.slow
def test_an_engine_whose_model_has_no_routers_does_not_start(tmp_path):
    dense = save_tiny_model(tmp_path / "dense")
    config = engine_config(dense, tmp_path, load_weights=True, routed_experts=True)
    with pytest.raises(EngineError, match="No supported MoE router found"):
        with running_engine(config):
            pass


def make_groups(with_experts: bool) -> ScoredGroups:
    draw = np.random.default_rng(1)

    def rollout(number: int, length: int) -> Trajectory:
        shape = (3 + length - 1, 2, 4)
        experts = draw.integers(0, 256, shape, dtype=np.uint8) if with_experts else None
        prompt, logprobs = Prompt(f"p{number}", "", "", (1, 2, 3)), (-1.0,) * length
        return single_turn(prompt, (5,) * length, logprobs, 0, "stop", "", routed_experts=experts)

    rollouts = [[rollout(i, 1 + i), rollout(i, 4)] for i in range(3)]
    return ScoredGroups(rollouts, torch.zeros(3, 2), 3)


def test_recorded_rollouts_keep_their_experts(tmp_path):
    log, groups = RolloutLog(tmp_path, {}), make_groups(True)
    log.write(7, groups, before={}, after={"at": 3})
    recorded, _ = log.read(7, {})
    assert values_of(recorded.rollouts) == values_of(groups.rollouts)
    samples = sum(groups.rollouts, [])
    for one, other in zip(samples, sum(recorded.rollouts, []), strict=True):
        assert one.routed_experts.dtype == other.routed_experts.dtype == np.uint8
        assert np.array_equal(one.routed_experts, other.routed_experts)
    path = tmp_path / "step_000007.npz"
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(samples[2].routed_experts.tobytes()) + 5] ^= 1
    path.write_bytes(damaged)
    message = "step_000007.npz: expected recorded rollouts, found damage .*routed_experts.npy"
    with pytest.raises(InputError, match=message):
        log.read(7, {})
    assert log.read(7, {"elsewhere": 1}) is None
    log.forget(7)
    assert not list(tmp_path.iterdir())


def test_rollouts_without_experts_have_none(tmp_path):
    log = RolloutLog(tmp_path, {})
    log.write(1, make_groups(False), before={}, after={})
    assert not log.read(1, {})[0].have_routed_experts
    assert make_groups(True).have_routed_experts


def test_a_continued_response_keeps_the_experts_that_sampled_its_tokens():
    def generation(tokens: int, experts: np.ndarray | None) -> Generation:
        ids = np.zeros(tokens, np.int32)
        return Generation(ids, ids.astype(np.float32), ids, "stop", experts)

    earlier, now = np.zeros((5, 2, 2), np.uint8), np.ones((9, 2, 2), np.uint8)
    joined = concatenate(generation(3, earlier), generation(4, now)).routed_experts
    assert joined[:, 0, 0].tolist() == [0] * 5 + [1] * 4
    assert concatenate(None, generation(4, now)).routed_experts is now
    assert concatenate(generation(3, None), generation(4, None)).routed_experts is None
