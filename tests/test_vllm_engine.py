"""``VLLMEngine``: sampling, weight updates and failures, with vLLM's server and a tiny model.

Tests of processes alone replace vLLM's server by ``tests.support.lease_server``.
"""

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
from megatron_espo.rollout import server as server_module
from megatron_espo.rollout.check_names import check_names
from megatron_espo.rollout.engine import EngineError, Sampling
from megatron_espo.rollout.file_transport import (
    FileTrainerInitInfo,
    FileTrainerWeightTransferEngine,
)
from megatron_espo.rollout.http_client import HttpClient, LoopThread
from megatron_espo.rollout.pool import EnginePool
from megatron_espo.rollout.server import PREFIX, run_key
from megatron_espo.rollout.transport import make_trainer_transport, send_weights
from megatron_espo.rollout.vllm_engine import VLLMEngine
from tests.support import lease_server
from tests.support.distributed import ROOT
from tests.support.real_engine import (
    EOS,
    assert_serves,
    engine_config,
    living_in_group,
    reference_logprobs,
    request_tokens,
    running_engine,
    sample,
    wait_until,
)
from tests.support.tiny import WORDS, save_tiny_model

LENGTH = 1024  # a response can take seconds


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
    """The module's engine; restarted if a test killed it. Its weights may be served or not."""
    if running.state == "dead":
        running.start()
        running.wait_ready()
    return running


@pytest.fixture
def loop():
    loop = LoopThread()
    yield loop
    loop.close()


def perturbed(folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The folder's model with noise on every weight."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def connect(engine: VLLMEngine, source):
    source = ModuleSource(source) if isinstance(source, torch.nn.Module) else source
    return make_trainer_transport("files", engine=engine, source=source, rank=0)


def update(engine: VLLMEngine, source, version: int) -> None:
    """An update without checks: transfer, resume, serve."""
    send_weights(connect(engine, source), engine, version)
    engine.resume()
    engine.serve()


def shapes(folder: Path) -> list[tuple[str, tuple[int, ...]]]:
    tensors = load_file(folder / "model.safetensors")
    return [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]


def assert_logprobs(found, expected: torch.Tensor, atol: float = 1e-4) -> None:
    logprobs = torch.from_numpy(found.logprobs).double()
    torch.testing.assert_close(logprobs, expected, atol=atol, rtol=0)


# -- one server with a model -------------------------------------------------------------------


def test_a_new_engine_serves_nothing(engine):
    with pytest.raises(EngineError, match="503 this server has served no weights yet"):
        sample(engine, PROMPTS[:1])


def test_every_path_requires_the_key_and_nothing_listens_on_the_network(engine):
    paths = ("/pause", "/update_weights", "/collective_rpc", "/v1/completions", "/nothing")

    async def statuses() -> set[int]:
        connector = aiohttp.UnixConnector(engine.address.removeprefix("unix:"))
        async with aiohttp.ClientSession("http://engine", connector=connector) as session:
            found = set()
            for path in (*paths, f"{PREFIX}/generate"):
                for headers in ({}, {"Authorization": "Bearer wrong"}):
                    async with session.post(path, json={}, headers=headers) as response:
                        found.add(response.status)
            return found

    assert asyncio.run(statuses()) == {401}
    inodes = {
        os.readlink(fd).removeprefix("socket:[").rstrip("]")
        for pid in living_in_group(engine._server.pid)
        for fd in Path(f"/proc/{pid}/fd").iterdir()
    }
    assert inodes
    for table, loopback in (("tcp", "0100007F"), ("tcp6", "01000000".rjust(32, "0"))):
        rows = [line.split() for line in Path("/proc/net", table).read_text().splitlines()[1:]]
        listening = [row for row in rows if row[3] == "0A" and row[9] in inodes]
        assert {row[1].split(":")[0] for row in listening} <= {loopback}


def test_requests_wait_for_served_weights_and_get_those_of_transformers(engine, folder, loop):
    """Float32 weights, then bfloat16 weights. No reply leaves between the update and ``serve``."""
    model = perturbed(folder, 3)
    update(engine, perturbed(folder, 2), 2)  # a server that never served weights answers 503
    send_weights(connect(engine, model), engine, 3)
    early = loop.submit(request_tokens(engine, PROMPTS[:2]))
    engine.resume()
    (canary,) = engine.canary(PROMPTS[:1], 4)
    assert_logprobs(canary, reference_logprobs(model, PROMPTS[0], canary.token_ids.tolist()))
    time.sleep(0.5)
    assert not early.done()
    engine.serve()
    assert {int(v) for (found,) in early.result(20) for v in found.versions} == {3}
    assert_serves(engine, model, PROMPTS)
    coarse = perturbed(folder, 4, torch.bfloat16)
    update(engine, coarse, 4)
    assert_serves(engine, coarse.float(), PROMPTS)


def test_a_seed_gives_the_same_tokens_in_any_batch(engine, folder):
    update(engine, perturbed(folder, 5), 5)
    groups = sample(engine, PROMPTS, 8, seed=11)
    alone = [sample(engine, [ids], 8, seed=11)[0] for ids in PROMPTS[::-1][:3]]
    for many, few in zip(groups[::-1], alone, strict=False):
        for one, other in zip(many, few, strict=True):
            assert one.token_ids.tolist() == other.token_ids.tolist()
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    everything = [found for group in groups for found in group]
    for found in everything:
        assert EOS not in found.token_ids[:-1]
        assert len(found.token_ids) == len(found.logprobs) == len(found.versions) <= 12
        assert found.finish_reason == ("stop" if found.token_ids[-1] == EOS else "length")
        assert set(found.versions) == {5}
    assert {found.finish_reason for found in everything} == {"stop", "length"}
    assert len({tuple(found.token_ids) for found in groups[0]}) > 1
    other = [found for group in sample(engine, PROMPTS, 8, seed=12) for found in group]
    tokens = [[found.token_ids.tolist() for found in batch] for batch in (everything, other)]
    assert tokens[0] != tokens[1]


def test_log_probs_are_processed(engine, folder):
    """They are computed after temperature and top-k, normalized over the k most likely tokens."""
    model = perturbed(folder, 6)
    update(engine, model, 6)
    ((found,),) = sample(engine, PROMPTS[:1], seed=1, temperature=1.3, top_k=3)
    ids = torch.tensor([[*PROMPTS[0], *found.token_ids]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(PROMPTS[0]) - 1 : -1].double() / 1.3
    top, tokens = logits.topk(3), torch.from_numpy(found.token_ids).long()[:, None]
    assert (top.indices == tokens).any(-1).all()
    assert_logprobs(found, logits.gather(-1, tokens)[:, 0] - top.values.logsumexp(-1))


def test_requests_in_flight_continue_after_an_update_with_tokens_of_both_versions(
    engine, folder, loop
):
    """A token's log-prob is that of the weights of its version, given all tokens before it."""
    models = {7: perturbed(folder, 7), 8: perturbed(folder, 8)}
    update(engine, models[7], 7)
    prompts, began = PROMPTS[:3], time.monotonic()
    sample(engine, prompts, seed=2, max_tokens=100, stop_token_ids=())
    quarter = time.monotonic() - began
    requests = request_tokens(engine, prompts, seed=3, max_tokens=400, stop_token_ids=())
    running = loop.submit(requests)
    time.sleep(quarter)
    update(engine, models[8], 8)
    for ids, (found,) in zip(prompts, running.result(60), strict=True):
        assert found.finish_reason == "length" and len(found.token_ids) == 400
        assert (np.diff(found.versions) >= 0).all() and set(found.versions) == {7, 8}
        response = found.token_ids.tolist()
        old, new = (reference_logprobs(models[version], ids, response) for version in (7, 8))
        assert_logprobs(found, torch.where(torch.from_numpy(found.versions) == 7, old, new), 2e-4)


def test_aborted_requests_answer_with_their_tokens_so_far(engine, folder, loop):
    update(engine, perturbed(folder, 9), 9)
    client = HttpClient(engine.address, run_key(engine.config.folder))
    options = {"seed": 4, "max_tokens": 900, "stop_token_ids": ()}
    running = loop.submit(request_tokens(engine, PROMPTS[:2], **options))
    time.sleep(0.5)
    loop.run(client.call("/abort_requests", {}), 20)
    parts = running.result(20)
    whole = sample(engine, PROMPTS[:2], **options | {"max_tokens": 200})
    for (part,), (full,) in zip(parts, whole, strict=True):
        count = min(len(part.token_ids), 200)
        assert part.finish_reason == "abort" and 0 < len(part.token_ids) < 900
        assert part.token_ids[:count].tolist() == full.token_ids[:count].tolist()
        np.testing.assert_allclose(part.logprobs[:count], full.logprobs[:count], atol=1e-4)
    loop.run(client.close(), 5)


class Forgetful(ModuleSource):
    """Announces a tensor and does not send it."""

    def iter_groups(self):
        for names, tensors in super().iter_groups():
            kept = [i for i, name in enumerate(names) if "layers.1.self_attn.k_proj" not in name]
            yield [names[i] for i in kept], [tensors[i] for i in kept]


@pytest.mark.slow
def test_the_error_names_missing_weights(engine, folder):
    message = r"1 weights did not reach worker 0: model\.layers\.1\.self_attn\.k_proj"
    with pytest.raises(EngineError, match=message):
        send_weights(connect(engine, Forgetful(perturbed(folder, 14))), engine, 14)
    assert engine.state == "dead"
    for call in (engine.resume, engine.wake_caches):
        with pytest.raises(EngineError):
            call()


def test_an_engine_serves_after_nan_and_after_sleep_and_a_nan_is_an_error(engine, folder):
    engine.fill_nan(shapes(folder))
    model = perturbed(folder, 10)
    update(engine, model, 10)
    assert_serves(engine, model, PROMPTS)
    engine.sleep()
    assert engine.state == "asleep"
    engine.wake(shapes(folder))
    assert engine.state == "running"
    model = perturbed(folder, 11)
    send_weights(connect(engine, model), engine, 11)
    engine.wake_caches()
    engine.resume()
    engine.serve()
    assert_serves(engine, model, PROMPTS)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    update(engine, model, 12)
    with pytest.raises(EngineError, match="not finite"):
        sample(engine, PROMPTS[:1])
    send_weights(connect(engine, model), engine, 13)
    engine.resume()
    with pytest.raises(EngineError, match="not finite"):
        engine.canary(PROMPTS[:1], 4)
    assert engine.state == "dead"


@pytest.mark.slow
def test_a_wrong_shape_is_an_error_before_and_during_the_load(engine, folder, tmp_path):
    """vLLM itself loads a part of a larger tensor, so only the comparison before refuses that."""
    changes = {"max_position_embeddings": LENGTH, "intermediate_size": 96}
    model = perturbed(save_tiny_model(tmp_path / "narrow", **changes), 1)
    message = r"up_proj\.weight: shape \(96, 64\), expected \(128, 64\)"
    with pytest.raises(InputError, match=message):
        check_names([(name, tuple(p.shape)) for name, p in model.named_parameters()], folder)
    transport = FileTrainerWeightTransferEngine.trainer_init(
        FileTrainerInitInfo(rank=0), client=engine, source=ModuleSource(model)
    )
    with pytest.raises(EngineError, match="failed: /update_weights"):
        send_weights(transport, engine, 1)
    assert engine.state == "dead"


@pytest.mark.slow
def test_two_servers_serve_their_own_weights(engine, folder, tmp_path):
    models = perturbed(folder, 17), perturbed(folder, 18)
    with running_engine(engine_config(folder, tmp_path)) as second:
        update(engine, models[0], 17)
        update(second, models[1], 18)
        assert_serves(engine, models[0], PROMPTS[:2])
        assert_serves(second, models[1], PROMPTS[:2])


@pytest.mark.slow
@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_worker_that_dies_or_stops_is_an_error_in_time(folder, tmp_path, loop, death):
    """One of two tensor-parallel workers. Held requests continue when a new server serves."""
    with running_engine(engine_config(folder, tmp_path, tensor_parallel_size=2)) as engine:
        model, limit = perturbed(folder, 19), 8.0
        update(engine, model, 19)
        assert_serves(engine, model, PROMPTS[:2])
        pool = EnginePool(str(tmp_path), limit)
        loop.run(pool.connect([engine.address]))
        workers = worker_pids(engine)
        assert len(workers) >= 2
        os.kill(workers[-1], death)
        held = loop.submit(pool.generate("held", PROMPTS[0], Sampling(8, seed=1)))
        began = time.monotonic()
        wait_until(lambda: pool.failure is not None, "the pool detects the failure", limit + 5)
        object.__setattr__(engine.config, "timeout_s", limit)
        with pytest.raises(EngineError):
            engine._worker("ping")
        assert engine.state == "dead"
        assert time.monotonic() - began < 3 * limit + 20 and not held.done()
        object.__setattr__(engine.config, "timeout_s", 300.0)
        engine.start()
        engine.wait_ready()
        update(engine, model, 20)
        loop.run(pool.connect([engine.address]), 5)
        assert set(held.result(30).versions) == {20} and pool.failure is None
        loop.run(pool.close(), 5)


def worker_pids(engine: VLLMEngine) -> list[int]:
    """Processes of a server other than its API process."""
    processes = [pid for pid in living_in_group(engine._server.pid) if pid != engine._server.pid]
    command = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes}
    return [pid for pid in processes if b"resource_tracker" not in command[pid]]


@pytest.mark.slow
def test_an_error_at_the_start_shows_the_log_and_code_in_the_folder_never_runs(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["NoSuchModel"], '
        '"auto_map": {"AutoModel": "code.Model", "AutoModelForCausalLM": "code.Model"}}'
    )
    touch = f"from pathlib import Path; Path({str(tmp_path / 'ran')!r}).touch()"
    (model / "code.py").write_text(touch)
    with pytest.raises(EngineError, match="NoSuchModel"):
        with running_engine(engine_config(model, tmp_path)):
            pass
    assert not (tmp_path / "ran").exists()


# -- processes without a model -------------------------------------------------------------------


@pytest.fixture
def light(folder, tmp_path, monkeypatch):
    """An engine whose server has no model."""
    monkeypatch.setattr(server_module, "server_command", lease_server.command)
    with running_engine(engine_config(folder, tmp_path)) as engine:
        yield engine


class Interrupted(ModuleSource):
    """Fails after the first group."""

    def iter_groups(self):
        yield next(super().iter_groups())
        raise KeyError("the gather failed")


def test_half_an_update_ends_the_engine(light, folder):
    """Its layers would reject another update."""
    group = light._server.pid
    with pytest.raises(KeyError):
        send_weights(connect(light, Interrupted(perturbed(folder, 16))), light, 16)
    assert light.state == "dead"
    wait_until(lambda: not living_in_group(group), "the server ends", 10)


def test_a_busy_event_loop_neither_keeps_the_server_nor_hides_the_error(light, monkeypatch):
    def run(coroutine, timeout):
        coroutine.close()
        raise TimeoutError

    group = light._server.pid
    monkeypatch.setattr(light._loop, "run", run)
    with pytest.raises(EngineError, match="no answer for 300 s"):
        light._call("/pause")
    assert light.state == "dead"
    wait_until(lambda: not living_in_group(group), "the server ends", 10)


def test_a_killed_server_is_an_error_at_once(light):
    group = light._server.pid
    os.kill(group, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(EngineError, match="has died"):
        light._worker("ping")
    assert light.state == "dead"
    assert time.monotonic() - began < 20


def test_a_stopped_server_is_an_error_within_its_time_limit(light):
    """SIGSTOP: the connection stays open, and no answer comes."""
    object.__setattr__(light.config, "timeout_s", 1.0)
    group = light._server.pid
    os.kill(group, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(EngineError, match="no answer for 1 s"):
        light.start_weight_update()
    assert light.state == "dead"
    assert time.monotonic() - began < 20
    wait_until(lambda: not living_in_group(group), "the stopped server ends")


def test_a_server_that_dies_while_it_starts(folder, tmp_path, loop):
    engine = VLLMEngine(engine_config(folder, tmp_path), loop)
    engine.config.log_path.write_text("MemoryError: of an earlier run")
    engine.start()
    os.kill(engine._server.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(EngineError, match="has died") as error:
        engine.wait_ready()
    assert "MemoryError" not in str(error.value)
    assert engine.state == "dead"
    assert time.monotonic() - began < 20


OWNER = """
import sys, time
from megatron_espo.rollout import server
from megatron_espo.rollout.http_client import LoopThread
from megatron_espo.rollout.vllm_engine import VLLMEngine
from tests.support import lease_server
from tests.support.real_engine import engine_config
workers = int(sys.argv[3])
if not workers:
    server.server_command = lease_server.command
config = engine_config(sys.argv[1], sys.argv[2], tensor_parallel_size=max(1, workers))
engine = VLLMEngine(config, LoopThread())
engine.start()
if workers != 1:
    engine.wait_ready()
print(engine._server.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    "workers",
    [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)],
    ids=["without vllm", "vllm starts", "two workers"],
)
def test_a_server_and_its_workers_end_with_their_killed_owner(folder, tmp_path, workers):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder), str(tmp_path), str(workers)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    group = int(owner.stdout.readline())
    assert len(living_in_group(group)) >= (3 if workers == 2 else 1)
    owner.kill()
    owner.wait()
    # A server that has just started imports vLLM before it notices.
    wait_until(lambda: not living_in_group(group), "the server ends", 90)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has this runner anyway")
def test_an_engine_with_the_model_runner_of_gpus():
    """Start, updates, read-back, NaN fill, canary and log-probs with vLLM's V2 model runner."""
    pytest.importorskip("triton")
    paths = [str(ROOT / "tests/support/second_runner"), str(ROOT)]
    variables = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    command = [sys.executable, "-m", "tests.support.gpu_steps", "engine", '{"eager": true}']
    done = subprocess.run(
        command,
        env=os.environ | variables | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("log-prob gap of the canary") == 2
