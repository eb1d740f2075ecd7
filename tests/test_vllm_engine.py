"""vLLM's real server with a tiny model: what it samples, how it takes weights, and how its failures look."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
from vllm.distributed.weight_transfer.base import ModuleSource

from megatron_espo.errors import InputError
from megatron_espo.rollout.engine import EngineError, Phase, Sampling, State
from megatron_espo.rollout.file_transport import FileTrainerInitInfo, FileTrainerWeightTransferEngine
from megatron_espo.rollout.http_client import LoopThread
from megatron_espo.rollout.pool import connected_pool
from megatron_espo.rollout.server import PREFIX
from megatron_espo.rollout.transport import make_trainer_transport, send_weights
from megatron_espo.rollout.vllm_engine import VLLMEngine
from tests.distributed import ROOT
from tests.real_engine import (
    EOS,
    assert_serves,
    engine_config,
    living_in_group,
    reference_logprobs,
    request_tokens,
    running_engine,
    sample,
)
from tests.tiny import WORDS, save_tiny_model

LENGTH = 1024  # so that a response can take seconds


def make_prompts(count: int = 6) -> list[tuple[int, ...]]:
    """Some are longer than a block of the prefix cache; every other one begins as the first."""
    ids = torch.randint(4, len(WORDS), (count, 40), generator=torch.Generator().manual_seed(7))
    ids[1::2, :36] = ids[0, :36]
    return [tuple(row[: 40 - 3 * i].tolist()) for i, row in enumerate(ids)]


PROMPTS = make_prompts()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=LENGTH)


@pytest.fixture(scope="module")
def running(folder, tmp_path_factory):
    with running_engine(engine_config(folder, tmp_path_factory.mktemp("run"))) as engine:
        yield engine


@pytest.fixture
def engine(running):
    """The module's engine, started again where a test before ended it. Its weights may be served or not."""
    if running.state == State.DEAD:
        running.start()
        running.wait_ready()
    return running


def perturbed(folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The folder's model with noise on every weight."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def update(engine: VLLMEngine, source, version: int) -> None:
    """An update without checks: transfer, resume, serve."""
    send_weights(connect(engine, source), engine, version)
    engine.resume()
    engine.serve()


def connect(engine: VLLMEngine, source):
    source = ModuleSource(source) if isinstance(source, torch.nn.Module) else source
    return make_trainer_transport("files", engine=engine, source=source, rank=0)


def shapes(folder: Path) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(tensor.shape)) for name, tensor in load_file(folder / "model.safetensors").items()]


def wait_until(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


# -- one server, from its start on --------------------------------------------------------------------------------------


def test_a_new_engine_serves_nothing_and_refuses_what_its_state_forbids(engine):
    assert engine.state == State.STALE and engine.policy_version is None and engine.max_model_len == LENGTH
    forbidden = [
        lambda: engine.update_weights({}), engine.finish_weight_update, engine.serve, lambda: engine.wake([]), engine.start,
        lambda: engine.canary([(5, 6)], 1), lambda: engine.read_back_checksums("float32"),
    ]  # fmt: skip
    for call in forbidden:
        with pytest.raises(EngineError):
            call()
        assert engine.state == State.STALE


def test_every_path_demands_the_key_and_nothing_listens_on_the_network(engine):
    async def statuses() -> set[int]:
        connector = aiohttp.UnixConnector(engine.address.removeprefix("unix:"))
        async with aiohttp.ClientSession("http://engine", connector=connector) as session:
            found = set()
            for path in ("/pause", "/update_weights", "/collective_rpc", f"{PREFIX}/generate", "/v1/completions", "/nothing"):
                for headers in ({}, {"Authorization": "Bearer wrong"}):
                    async with session.post(path, json={}, headers=headers) as response:
                        found.add(response.status)
            return found

    assert asyncio.run(statuses()) == {401}
    inodes = set()
    for pid in living_in_group(engine.pid):
        inodes |= {os.readlink(fd).removeprefix("socket:[").rstrip("]") for fd in Path(f"/proc/{pid}/fd").iterdir()}
    assert inodes
    for table, loopback in (("tcp", "0100007F"), ("tcp6", "01000000".rjust(32, "0"))):
        rows = [line.split() for line in Path("/proc/net", table).read_text().splitlines()[1:]]
        addresses = {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}  # 0A: listening
        assert addresses <= {loopback}


def test_requests_wait_for_served_weights_and_get_those_of_transformers(engine, folder):
    """Float32 weights, then bfloat16 ones on the wire. No reply leaves between the update and ``serve``."""
    model, loop = perturbed(folder, 3), LoopThread()
    update(engine, perturbed(folder, 2), 2)  # a server that never served weights refuses
    send_weights(connect(engine, model), engine, 3)
    early = loop.submit(request_tokens(engine, PROMPTS[:2]))
    engine.resume()
    assert engine.state == State.UPDATING
    (canary,) = engine.canary(PROMPTS[:1], 4)
    expected = reference_logprobs(model, PROMPTS[0], canary.token_ids.tolist())
    torch.testing.assert_close(torch.from_numpy(canary.logprobs).double(), expected, atol=1e-4, rtol=0)
    time.sleep(0.5)
    assert not early.done()
    engine.serve()
    assert {int(v) for (found,) in early.result(20) for v in found.versions} == {3}
    assert engine.policy_version == 3
    assert_serves(engine, model, PROMPTS)
    coarse = perturbed(folder, 4, torch.bfloat16)
    update(engine, coarse, 4)
    assert_serves(engine, coarse.float(), PROMPTS)
    loop.close()


def test_a_seed_gives_its_tokens_whatever_else_is_sampled(engine, folder):
    update(engine, perturbed(folder, 5), 5)
    groups = sample(engine, PROMPTS, 8, seed=11)
    alone = [sample(engine, [ids], 8, seed=11)[0] for ids in PROMPTS[::-1][:3]]
    for many, few in zip(groups[::-1], alone, strict=False):
        for one, other in zip(many, few, strict=True):
            assert one.token_ids.tolist() == other.token_ids.tolist()
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    everything = [found for group in groups for found in group]
    for found in everything:
        assert EOS not in found.token_ids[:-1] and len(found.token_ids) == len(found.logprobs) == len(found.versions) <= 12
        assert found.finish_reason == ("stop" if found.token_ids[-1] == EOS else "length")
        assert set(found.versions) == {5}
    assert {found.finish_reason for found in everything} == {"stop", "length"}
    assert len({tuple(found.token_ids) for found in groups[0]}) > 1
    other = sample(engine, PROMPTS, 8, seed=12)
    assert [found.token_ids.tolist() for group in other for found in group] != [found.token_ids.tolist() for found in everything]


def test_log_probs_are_processed(engine, folder):
    """After temperature and top-k: the reference's, renormalized over the k most likely tokens."""
    model = perturbed(folder, 6)
    update(engine, model, 6)
    ((found,),) = sample(engine, PROMPTS[:1], seed=1, temperature=1.3, top_k=3)
    ids = torch.tensor([[*PROMPTS[0], *found.token_ids]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(PROMPTS[0]) - 1 : -1].double() / 1.3
    top = logits.topk(3)
    assert all(token in row for token, row in zip(found.token_ids.tolist(), top.indices.tolist(), strict=True))
    chosen = logits.gather(-1, torch.from_numpy(found.token_ids).long()[:, None])[:, 0] - top.values.logsumexp(-1)
    torch.testing.assert_close(torch.from_numpy(found.logprobs).double(), chosen, atol=1e-4, rtol=0)


def test_requests_in_flight_go_on_after_an_update_with_tokens_of_both_versions(engine, folder):
    """Each token's log-prob is that of the weights whose version it carries, given all tokens before it."""
    models, loop = {7: perturbed(folder, 7), 8: perturbed(folder, 8)}, LoopThread()
    update(engine, models[7], 7)
    prompts = PROMPTS[:3]
    began = time.monotonic()
    sample(engine, prompts, seed=2, max_tokens=200, stop_token_ids=())  # for the time of a quarter of the next responses
    running = loop.submit(request_tokens(engine, prompts, seed=3, max_tokens=800, stop_token_ids=()))
    time.sleep(time.monotonic() - began)
    update(engine, models[8], 8)
    for ids, (found,) in zip(prompts, running.result(60), strict=True):
        assert found.finish_reason == "length" and len(found.token_ids) == 800
        assert (np.diff(found.versions) >= 0).all()
        assert set(found.versions) == {7, 8}
        expected = {version: reference_logprobs(model, ids, found.token_ids.tolist()) for version, model in models.items()}
        by_version = torch.stack([expected[int(version)][i] for i, version in enumerate(found.versions)])
        torch.testing.assert_close(torch.from_numpy(found.logprobs).double(), by_version, atol=2e-4, rtol=0)
    loop.close()


def test_aborted_requests_answer_with_what_they_have(engine, folder):
    update(engine, perturbed(folder, 9), 9)
    loop = LoopThread()
    pool = loop.run(connected_pool(engine.config.folder, 60.0, [engine.address]))
    running = loop.submit(request_tokens(engine, PROMPTS[:2], seed=4, max_tokens=900, stop_token_ids=()))
    time.sleep(1.0)
    for client in pool._clients:
        loop.run(client.call(f"{PREFIX}/abort", {}), 20)
    whole = sample(engine, PROMPTS[:2], seed=4, max_tokens=900, stop_token_ids=())
    for (part,), (full,) in zip(running.result(20), whole, strict=True):
        assert part.finish_reason == "abort" and 0 < len(part.token_ids) < 900
        assert part.token_ids.tolist() == full.token_ids[: len(part.token_ids)].tolist()
        np.testing.assert_allclose(part.logprobs, full.logprobs[: len(part.logprobs)], atol=1e-4)
    loop.run(pool.close(), 5)
    loop.close()


def test_an_engine_that_slept_wakes_without_weights_and_a_nan_is_an_error(engine, folder):
    update(engine, perturbed(folder, 10), 10)
    engine.sleep()
    assert engine.state == State.ASLEEP and engine.policy_version is None
    for call in (engine.sleep, engine.serve, engine.start_weight_update, lambda: engine.canary([(5, 6)], 1)):
        with pytest.raises(EngineError):
            call()
        assert engine.state == State.ASLEEP
    engine.wake(shapes(folder))
    assert engine.state == State.STALE
    model = perturbed(folder, 11)
    send_weights(connect(engine, model), engine, 11)
    engine.wake_caches()
    engine.resume()
    engine.serve()
    assert_serves(engine, model, PROMPTS)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    update(engine, model, 12)
    with pytest.raises(EngineError, match="not finite") as caught:
        sample(engine, PROMPTS[:1])
    assert caught.value.phase == Phase.ROLLOUT
    send_weights(connect(engine, model), engine, 13)
    engine.resume()
    with pytest.raises(EngineError, match="not finite") as caught:
        engine.canary(PROMPTS[:1], 4)
    assert caught.value.phase == Phase.CANARY and engine.state == State.DEAD


# -- updates that fail ---------------------------------------------------------------------------------------------------


class Forgetful(ModuleSource):
    """Announces a tensor and does not send it."""

    def iter_groups(self):
        for names, tensors in super().iter_groups():
            kept = [i for i, name in enumerate(names) if "layers.1.self_attn.k_proj" not in name]
            yield [names[i] for i in kept], [tensors[i] for i in kept]


class Interrupted(ModuleSource):
    """Breaks off after the first group."""

    def iter_groups(self):
        for number, group in enumerate(super().iter_groups()):
            if number:
                raise KeyError("the gather failed")
            yield group


def test_missing_weights_are_named_and_the_next_engine_takes_a_whole_update(engine, folder):
    model = perturbed(folder, 14)
    with pytest.raises(EngineError, match=r"1 weights did not reach worker 0: model\.layers\.1\.self_attn\.k_proj") as caught:
        send_weights(connect(engine, Forgetful(model)), engine, 14)
    assert caught.value.phase == Phase.TRANSFER and engine.state == State.DEAD and engine.policy_version is None
    for call in (engine.resume, engine.check_health, engine.wait_ready):
        with pytest.raises(EngineError):
            call()
    engine.start()
    engine.wait_ready()
    engine.fill_nan(shapes(folder))
    send_weights(connect(engine, model), engine, 15)
    engine.serve()
    engine.resume()
    assert_serves(engine, model, PROMPTS)


def test_half_an_update_ends_the_engine(engine, folder):
    """Its layers would refuse another update."""
    group = engine.pid
    with pytest.raises(KeyError):
        send_weights(connect(engine, Interrupted(perturbed(folder, 16))), engine, 16)
    assert engine.state == State.DEAD
    wait_until(lambda: not living_in_group(group), 10, "the server outlived a rejected update")


@pytest.mark.slow
def test_a_wrong_shape_fails_at_the_load(engine, folder, tmp_path):
    """The names are compared before; here a client that does not compare them."""
    other = save_tiny_model(tmp_path / "wide", max_position_embeddings=LENGTH, intermediate_size=160)
    model = perturbed(other, 1)
    with pytest.raises(InputError, match=r"up_proj\.weight: shape \(160, 64\), expected \(128, 64\)"):
        connect(engine, model)
    assert engine.state in (State.STALE, State.READY)
    transport = FileTrainerWeightTransferEngine.trainer_init(
        FileTrainerInitInfo(rank=0), client=engine, source=ModuleSource(model)
    )
    with pytest.raises(EngineError) as caught:
        send_weights(transport, engine, 1)
    assert caught.value.phase == Phase.LOAD and engine.state == State.DEAD


# -- processes that die or stop -------------------------------------------------------------------------------------------


def test_two_servers_at_once_and_the_death_of_one(engine, folder, tmp_path):
    """Each serves its own weights. A control call to a killed server fails at once; the other server goes on."""
    models = perturbed(folder, 17), perturbed(folder, 18)
    with running_engine(engine_config(folder, tmp_path)) as second:
        update(engine, models[0], 17)
        update(second, models[1], 18)
        assert_serves(engine, models[0], PROMPTS[:2])
        assert_serves(second, models[1], PROMPTS[:2])
        group = second.pid
        os.kill(group, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(EngineError, match="has died") as caught:
            second.check_health()
        assert time.monotonic() - began < 5 and caught.value.phase == Phase.ROLLOUT and second.state == State.DEAD
        wait_until(lambda: not living_in_group(group), 10, "a process of the killed server lives")
        assert_serves(engine, models[0], PROMPTS[:2])


def worker_pids(engine: VLLMEngine) -> list[int]:
    """Processes of a server other than its API process."""
    return [pid for pid in living_in_group(engine.pid) if pid != engine.pid and b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_worker_that_dies_or_stops_is_an_error_in_time(folder, tmp_path, death):
    """Of two tensor-parallel workers. Held requests go on once a new server serves."""
    with running_engine(engine_config(folder, tmp_path, tensor_parallel_size=2)) as engine:
        model, loop, limit = perturbed(folder, 19), LoopThread(), 8.0
        update(engine, model, 19)
        assert_serves(engine, model, PROMPTS[:2])
        pool = loop.run(connected_pool(str(tmp_path), limit, [engine.address]))
        workers = worker_pids(engine)
        assert len(workers) >= 2
        os.kill(workers[-1], death)
        held = loop.submit(pool.generate("held", PROMPTS[0], Sampling(8, seed=1)))
        began = time.monotonic()
        wait_until(lambda: pool.failure is not None, limit + 5, "the pool did not see a failure")
        object.__setattr__(engine.config, "timeout_s", limit)
        with pytest.raises(EngineError) as caught:
            engine.check_health()
        assert caught.value.phase == Phase.ROLLOUT and engine.state == State.DEAD and time.monotonic() - began < 3 * limit
        assert not held.done()
        engine.start()
        engine.wait_ready()
        object.__setattr__(engine.config, "timeout_s", 60.0)
        update(engine, model, 20)
        loop.run(pool.connect([engine.address]), 5)
        found = held.result(30)
        assert set(found.versions) == {20} and pool.failure is None
        loop.run(pool.close(), 5)
        loop.close()


def test_a_stopped_server_is_an_error_within_its_time_limit(engine, folder):
    """SIGSTOP: the connection stays open, and no answer comes."""
    update(engine, perturbed(folder, 21), 21)
    object.__setattr__(engine.config, "timeout_s", 2.0)
    group = engine.pid
    os.kill(group, signal.SIGSTOP)
    began = time.monotonic()
    try:
        with pytest.raises(EngineError, match="no answer for 2 s") as caught:
            engine.start_weight_update()
    finally:
        object.__setattr__(engine.config, "timeout_s", 60.0)
    assert caught.value.phase == Phase.TRANSFER and engine.state == State.DEAD and time.monotonic() - began < 6
    wait_until(lambda: not living_in_group(group), 10, "the stopped server lives")


def test_a_server_that_dies_while_it_starts(folder, tmp_path):
    engine = VLLMEngine(engine_config(folder, tmp_path), LoopThread())
    engine.start()
    os.kill(engine.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(EngineError, match="has died") as caught:
        engine.wait_ready()
    assert caught.value.phase == Phase.START and engine.state == State.DEAD and time.monotonic() - began < 5


@pytest.mark.slow
def test_an_error_at_the_start_arrives_with_the_log_and_code_in_the_folder_never_runs(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["NoSuchModel"], "auto_map": {"AutoModel": "code.Model", "AutoModelForCausalLM": "code.Model"}}'
    )
    (model / "code.py").write_text(f"from pathlib import Path; Path({str(tmp_path / 'ran')!r}).touch()")
    with pytest.raises(EngineError, match="NoSuchModel") as caught, running_engine(engine_config(model, tmp_path)):
        pass
    assert caught.value.phase == Phase.START and not (tmp_path / "ran").exists()


OWNER = """
import sys, time
from megatron_espo.rollout.http_client import LoopThread
from megatron_espo.rollout.vllm_engine import VLLMEngine
from tests.real_engine import engine_config
engine = VLLMEngine(engine_config(sys.argv[1], sys.argv[2], tensor_parallel_size=int(sys.argv[3])), LoopThread())
engine.start()
if sys.argv[4] == "ready":
    engine.wait_ready()
print(engine.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("workers", "moment"), [(1, "starting"), pytest.param(2, "ready", marks=pytest.mark.slow)], ids=["starting", "ready"]
)
def test_a_server_and_its_workers_end_with_their_killed_owner(folder, tmp_path, workers, moment):
    command = [sys.executable, "-c", OWNER, str(folder), str(tmp_path), str(workers), moment]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    group = int(owner.stdout.readline())
    assert len(living_in_group(group)) >= (3 if workers == 2 else 1)
    owner.kill()
    owner.wait()
    wait_until(lambda: not living_in_group(group), 20, "a process of the server outlived its owner")
