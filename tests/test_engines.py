"""Several engines sample the tokens of one. Held requests continue after an engine is killed."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("vllm")
from megatron_espo.config import Rollout, load_config
from megatron_espo.config.checks import check_world_size
from megatron_espo.data.rollout_store import RolloutLog
from megatron_espo.errors import InputError
from megatron_espo.files import safetensors_header
from megatron_espo.rollout import http_client
from megatron_espo.rollout.engine import Generation, Sampling
from megatron_espo.rollout.http_client import LoopThread
from megatron_espo.rollout.pool import EnginePool, request_seed
from megatron_espo.rollout.transport import engine_devices
from tests.support.distributed import ROOT
from tests.support.real_engine import engine_config, running_engine, wait_until
from tests.support.tiny import save_tiny_model, write_tiny_run

STEPS = 3
PROMPTS = [tuple(4 + (5 * i + j) % 20 for j in range(8 + i)) for i in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    model = save_tiny_model(folder / "model", max_position_embeddings=512)
    names = safetensors_header(model / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    # Mistral's own format, which engines must ignore.
    save_file({"layers.0.a": np.zeros(2)}, model / "consolidated.safetensors")
    (model / "params.json").write_text("{}")
    write_tiny_run(
        folder,
        run={"steps": STEPS, "keep_rollouts": True, "save_hf": False, "checkpoint_every": None},
        rollout={"engine_args": {"kv_cache_memory_bytes": 1 << 27}},
    )
    return folder


# -- behind a pool -------------------------------------------------------------------------------


def submit(loop: LoopThread, pool: EnginePool, tokens: int) -> list:
    """Futures of one request for each prompt, spread over the engines."""

    def request(slot: int, ids: tuple[int, ...]):
        sampling = Sampling(tokens, seed=request_seed(1, slot), slot=slot)
        return loop.submit(pool.generate(f"request-{slot}", ids, sampling))

    return [request(slot, ids) for slot, ids in enumerate(PROMPTS)]


def results(futures: list) -> list[list[int]]:
    found: list[Generation] = [future.result(90) for future in futures]
    return [generation.token_ids.tolist() for generation in found]


@pytest.mark.slow
def test_a_pool_of_two_gives_the_tokens_of_one_also_when_an_engine_is_killed(folder, tmp_path):
    loop, pool = LoopThread(), EnginePool(str(tmp_path), 30.0)
    one, two = (
        engine_config(folder / "model", tmp_path, log_name=f"{i}.log", load_weights=True)
        for i in range(2)
    )
    with running_engine(one) as first, running_engine(two) as second:
        loop.run(pool.connect([first.address]))
        expected = results(submit(loop, pool, 300))
        loop.run(pool.connect([first.address, second.address]))
        assert results(submit(loop, pool, 300)) == expected
        running = submit(loop, pool, 300)
        time.sleep(0.5)  # 300 tokens take more than a second
        os.kill(second._server.pid, signal.SIGKILL)
        wait_until(lambda: pool.failure is not None, "the pool detects the failure", 10)
        assert not all(future.done() for future in running)
        loop.run(pool.connect([first.address]))
        assert results(running) == expected and pool.failure is None
        loop.run(pool.close(), 5)
    loop.close()


# -- in runs -------------------------------------------------------------------------------------


def start(folder: Path, run: str, *overrides: str) -> subprocess.Popen:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", "-m", "megatron_espo", "train"]
    return subprocess.Popen(
        [*command, str(folder / "run.yaml"), f"run.dir={folder / run}", *overrides],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train(folder: Path, run: str, *overrides: str) -> str:
    process = start(folder, run, *overrides)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


def recorded(folder: Path, run: str) -> list:
    """What the rollouts of each step must have in common.

    Log-probs are left out: their last bits depend on the batches of the engine.
    """
    log, found = RolloutLog(folder / run / "rollouts", {}), []
    for step in range(1, STEPS + 1):
        groups = log.read(step, None)[0]
        samples = [
            (one.prompt.id, one.response_ids.tolist(), one.versions.tolist(), one.finish_reason)
            for group in groups.rollouts
            for one in group
        ]
        found.append((samples, groups.rewards.tolist()))
    return found


@pytest.fixture(scope="module")
def of_one_engine(folder) -> list:
    train(folder, "one")
    return recorded(folder, "one")


@pytest.mark.slow
def test_two_engines_sample_the_tokens_of_one(folder, of_one_engine):
    train(folder, "two", "rollout.engines=2")
    assert (folder / "two" / "engine-rank1.log").stat().st_size > 0
    assert recorded(folder, "two") == of_one_engine
    metrics = (folder / "two" / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line)["mismatch/canary"] for line in metrics) < 1e-4


def engine_pid(log: Path) -> int | None:
    """The API process of the server that writes to ``log``."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            is_server = b"api_server" in (entry / "cmdline").read_bytes()
            if is_server and os.readlink(entry / "fd" / "1") == str(log):
                return int(entry.name)
        except OSError:
            pass
    return None


@pytest.mark.slow
def test_a_killed_engine_of_another_rank_restarts(folder, of_one_engine):
    process = start(folder, "killed", "rollout.engines=2")
    metrics, deadline = folder / "killed" / "metrics.jsonl", time.monotonic() + 200
    while not metrics.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    os.kill(engine_pid(folder / "killed" / "engine-rank1.log"), signal.SIGKILL)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    assert "restarting the rollout engine" in output
    assert recorded(folder, "killed") == of_one_engine


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["rollout.engines=3"], 4, "expected a divisor of the 4 ranks"),
        (
            ["rollout.engines=2", "rollout.tensor_parallel_size=4"],
            4,
            "rollout.tensor_parallel_size at most that, got 2",
        ),
    ],
)
def test_engines_must_fit_the_ranks(folder, overrides, world_size, message):
    with pytest.raises(InputError, match=message):
        check_world_size(load_config(folder / "run.yaml", ["run.dir=x", *overrides]), world_size)


def test_engines_of_one_machine_take_their_owners_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for name, value in {"LOCAL_WORLD_SIZE": "8", "RANK": "12", "LOCAL_RANK": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert engine_devices(Rollout(engines=4, tensor_parallel_size=4)) == "4,5,6,7"
    assert engine_devices(Rollout(tensor_parallel_size=4)) is None
    assert engine_devices(Rollout(engines=4, visible_devices="6,7")) == "6,7"


def test_an_idle_connection_is_not_used_again(tmp_path, monkeypatch):
    """A server may close an idle connection at the moment at which the next request arrives."""
    monkeypatch.setattr(http_client, "_IDLE_SECONDS", 0.05)
    path, answer = str(tmp_path / "socket"), b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"

    async def serve_one_request(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await reader.read(1)  # the next request, or the end of the connection
        writer.close()

    async def two_requests():
        async with await asyncio.start_unix_server(serve_one_request, path):
            client = http_client.HttpClient(f"unix:{path}", "key")
            assert await client.call("/first") == {}
            await asyncio.sleep(0.2)
            assert await client.call("/second") == {}
            await client.close()

    asyncio.run(two_requests())


def test_requests_wait_while_the_listen_queue_is_full(tmp_path):
    path, answer = str(tmp_path / "socket"), b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)

    async def burst(listener):
        client = http_client.HttpClient(f"unix:{path}", "key")
        requests = [asyncio.create_task(client.call("/", {"i": i})) for i in range(20)]
        await asyncio.sleep(0.3)  # the server is busy
        async with await asyncio.start_unix_server(serve, sock=listener):
            assert await asyncio.gather(*requests) == [{}] * 20
            await client.close()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(2)
        asyncio.run(burst(listener))
