"""The engine's choice of experts: which they are, and how they are kept on disk."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_espo.batch import InFlight, ScoredGroups
from megatron_espo.errors import InputError
from megatron_espo.rollout.engine import _joined
from megatron_espo.rollout_log import RolloutLog
from megatron_espo.types import Prompt, Rollout
from tests.tiny import save_tiny_model

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Three layers, of which the middle one is dense."""
    return save_tiny_model(tmp_path_factory.mktemp("moe"), "qwen3_moe", num_hidden_layers=3, mlp_only_layers=[1], **EXPERTS)


@pytest.mark.parametrize("tensor_parallel_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_engine_tells_the_experts_that_its_router_chose(model, tmp_path, tensor_parallel_size):
    """In float32 those of transformers, for tokens computed by another request, in pieces, or twice; none in an evaluation."""
    pytest.importorskip("vllm")
    from tests.routed_engine import ask

    told = ask(model, tensor_parallel_size, tmp_path / "answer.json")
    assert told["wrong"] == 0 and told["compared"] > 20000, told
    assert told["cached"] >= 10 and told["in pieces"] >= 1 and told["preempted"] >= 10, told
    assert told["unfinished, known"] >= 10 and told["unfinished, preempted"] >= 1, told
    assert told["dtype"] == "uint8" and told["judged"] == [None] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_vllms_own_record_on_a_gpu(model, tmp_path):
    """Written against vLLM 0.32's ``enable_return_routed_experts``; near-ties may fall either way there."""
    from transformers import AutoModelForCausalLM

    from megatron_espo.rollout import Engine
    from tests.test_rollout import engine_config

    config = engine_config(model, tmp_path / "engine.log", load_weights=True, routed_experts=True)
    prompts = [Prompt(f"p{i}", "", "", tuple(4 + (i * 7 + j) % 20 for j in range(40))) for i in range(8)]
    with Engine(config, decode=str).start() as engine:
        engine.wait_ready()
        rollouts = [rollout for group in engine.generate(prompts, 4, seed=1) for rollout in group]
    reference, same = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), []
    for rollout in rollouts:
        tokens = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids]])
        own = torch.stack(reference(tokens, output_router_logits=True).router_logits, 1)[:-1].topk(2).indices.sort(-1).values
        found = torch.from_numpy(rollout.routed_experts.astype("int64")).sort(-1).values
        assert found.shape == own.shape
        same.append((found == own).all(-1).float().mean())
    assert torch.stack(same).mean() > 0.98


def test_an_engine_that_cannot_tell_says_what_to_do(model, monkeypatch):
    """vLLM's refusal is real; only the model is one that it cannot listen to."""
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.fused_moe.routed_experts_capturer import bind_routed_experts_capturer

    from megatron_espo.rollout import server
    from megatron_espo.rollout.config import EngineConfig

    monkeypatch.setattr(server, "build_llm", lambda config: bind_routed_experts_capturer(torch.nn.Linear(1, 1), None))
    options = {"log_path": "", "dtype": "float32", "transport": "", "max_response_tokens": 4, "eos_ids": frozenset({2})}
    with pytest.raises(RuntimeError, match=r"No supported MoE router found(.|\n)*rollout.router_replay: expected an engine that returns the experts"):
        server.Server(EngineConfig(str(model), routed_experts=True, **options), lambda *news: None)


def make_groups(with_experts: bool) -> ScoredGroups:
    draw = np.random.default_rng(1)

    def rollout(number: int, length: int) -> Rollout:
        experts = draw.integers(0, 256, (3 + length - 1, 2, 4), dtype=np.uint8) if with_experts else None
        return Rollout(Prompt(f"p{number}", "", "", (1, 2, 3)), (5,) * length, (-1.0,) * length, "stop", 0, "", experts)

    return ScoredGroups([[rollout(i, 1 + i), rollout(i, 4)] for i in range(3)], torch.zeros(3, 2), 3)


def test_recorded_rollouts_keep_their_experts(tmp_path):
    """Those in flight too, of which some may be known in part and some not at all."""
    log, groups, whole = RolloutLog(tmp_path, {}), make_groups(True), make_groups(True).rollouts[2][1]
    begun = replace(whole, routed_experts=whole.routed_experts[:5], finish_reason="unfinished")
    queued = replace(whole, response_ids=(), logprobs=(), routed_experts=None, finish_reason="unfinished")
    log.write(7, groups, before={}, after={"at": 3}, in_flight=[InFlight(6, [whole, begun, queued])])
    recorded = log.read(7, {})
    (left,) = log.in_flight_after(7)
    assert recorded.groups.rollouts == groups.rollouts and recorded.in_flight[0].rollouts == left.rollouts == [whole, begun, queued]
    samples = sum(groups.rollouts, [])
    for one, other in zip([*samples, whole, begun], [*sum(recorded.groups.rollouts, []), *left.rollouts[:2]], strict=True):
        assert one.routed_experts.dtype == other.routed_experts.dtype and np.array_equal(one.routed_experts, other.routed_experts)
    assert left.rollouts[2].routed_experts is None
    tokens = sum(len(sample.routed_experts) for sample in [*samples, whole, begun])
    assert 0 < (tmp_path / "step_000007.npy").stat().st_size - tokens * 2 * 4 < 256, "a byte each"
    damaged = bytearray((tmp_path / "step_000007.npy").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "step_000007.npy").write_bytes(damaged)
    with pytest.raises(InputError, match="step_000007.json.gz: expected recorded rollouts, found damage .*step_000007.npy: another checksum"):
        log.read(7, {})
    assert log.read(7, {"elsewhere": 1}) is None
    log.forget(7)
    assert not list(tmp_path.iterdir())


def test_rollouts_without_experts_leave_no_file_and_no_copy_carries_any(tmp_path):
    import pickle

    log = RolloutLog(tmp_path, {})
    log.write(1, make_groups(False), before={}, after={})
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001.json.gz"] and not log.read(1, {}).groups.have_routed_experts
    groups = make_groups(True)
    sent = pickle.loads(pickle.dumps(groups))
    assert groups.have_routed_experts and not sent.have_routed_experts
    assert sent.rollouts == groups.rollouts and sent.dispatched == 3


def test_a_response_that_is_gone_on_with_keeps_the_experts_that_drew_its_tokens():
    earlier, now = np.zeros((5, 2, 2), np.uint8), np.ones((9, 2, 2), np.uint8)
    assert _joined(earlier, now)[:, 0, 0].tolist() == [0] * 5 + [1] * 4
    assert _joined(None, now) is now and _joined(earlier, None) is earlier and _joined(None, None) is None
