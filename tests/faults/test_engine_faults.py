"""Requests and prompts when the rollout engine, one of its processes or its owner fails."""

import asyncio
import json
import os
import signal
import subprocess
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from aiohttp import web
from safetensors.numpy import save

from megatron_espo.config import Algorithm, Config, Data, Model, Rollout, Run, load_config
from megatron_espo.data.prompts import PromptStream
from megatron_espo.data.rollout_store import RolloutLog
from megatron_espo.data.tokenizer import load_tokenizer
from megatron_espo.monitoring.progress import Phases
from megatron_espo.rollout.engine import EngineError, Sampling
from megatron_espo.rollout.http_client import HttpClient, LoopThread
from megatron_espo.rollout.pool import EnginePool
from megatron_espo.rollout.sampler import Sampler
from megatron_espo.rollout.server import PREFIX, run_key
from megatron_espo.trainer.ledger import Ledger
from megatron_espo.types import Prompt
from tests.faults.runs import Runs
from tests.support.real_engine import engine_config, wait_until
from tests.support.tiny import save_tiny_model, write_tiny_run
from tests.support.trajectories import single_turn

PROMPT, SAMPLING = (5, 6, 7), Sampling(12, seed=3)
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def loop():
    loop = LoopThread()
    yield loop
    loop.close()


# -- a server that loses replies -----------------------------------------------------------------


class LossyServer:
    """Answers requests for tokens except for the first one.

    Attributes:
        bodies: of the requests that arrived.
    """

    def __init__(self, path: Path, how: str) -> None:
        self.address, self._path, self._how, self.bodies = f"unix:{path}", path, how, []

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post(f"{PREFIX}/generate", self._generate)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self._path)).start()

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _generate(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.json())
        if len(self.bodies) == 1:
            if self._how == "closed":
                request.transport.close()
            await asyncio.sleep(3600)
        arrays = {
            "token_ids": np.array([8, 9], np.int32),
            "logprobs": np.array([-1, -2], np.float32),
            "versions": np.zeros(2, np.int32),
        }
        return web.Response(body=save(arrays), headers={"x-finish-reason": "stop"})


@pytest.mark.parametrize("how", ["closed", "silent"])
def test_a_lost_reply_counts_as_a_failed_server_and_the_request_is_sent_again(loop, tmp_path, how):
    server, pool = LossyServer(tmp_path / "socket", how), EnginePool(str(tmp_path), timeout_s=1.0)
    loop.run(server.start())
    try:
        loop.run(pool.connect([server.address]))
        reply = loop.submit(pool.generate("r", PROMPT, SAMPLING))
        wait_until(lambda: pool.failure is not None, "the pool detects the failure", 10)
        assert not reply.done() and len(server.bodies) == 1
        loop.run(pool.connect([server.address]))
        assert reply.result(10).token_ids.tolist() == [8, 9] and pool.failure is None
        first, second = server.bodies
        assert first.pop("request_id") != second.pop("request_id")
        assert first == second, "the same request, with the same seed"
    finally:
        loop.run(pool.close())
        loop.run(server.stop())


# -- the sampler, with an environment that answers at once ---------------------------------------


class Numbers:
    """A prompt stream: 0, 1, 2, ..."""

    position = skipped = 0

    def note_solved(self, prompt):
        pass

    def take(self, count):
        self.position += count
        return self.find(range(self.position - count, self.position))

    def find(self, ids):
        return [Prompt(str(i), "", "", (5,)) for i in ids]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class InstantRunner:
    """Every trajectory is complete at once. The rewards of every third prompt are equal."""

    tokenizer = SimpleNamespace(eos_ids=frozenset({2}))
    last_failure = ""

    def start(self, prompt, name, sampling, seeds):
        found = single_turn(prompt, (8,), (-1.0,), (0,), "stop", "")
        rewards = [float(i) if int(prompt.id) % 3 else 1.0 for i in range(len(seeds))]
        return [done(found.with_reward(reward)) for reward in rewards]


def done(result) -> Future:
    future = Future()
    future.set_result(result)
    return future


class NoRewards:
    def submit(self, found):
        return done(found)

    def check_failures(self, *counts):
        pass

    def pop_metrics(self):
        return {}


def sampled(fails_at: int, **rollout) -> list[list[str]]:
    """The prompts of three steps. An engine fails once, at poll number ``fails_at``."""
    polls = [0]

    def check():
        polls[0] += 1
        if polls[0] == fails_at:
            raise EngineError("it broke")

    correction = Algorithm(
        rollout_correction="token" if rollout.get("max_staleness") else "metrics"
    )
    settings = Rollout(prompts_per_step=4, group_size=2, **rollout)
    config = Config(
        run=Run(steps=3),
        model=Model(path="none"),
        algorithm=correction,
        rollout=settings,
        data=Data(prompts="reasoning_gym:none"),
    )
    sampler, ledger, steps = (
        Sampler(config, Numbers(), InstantRunner(), NoRewards(), check),
        Ledger(),
        [],
    )
    while len(steps) < 3:
        try:
            groups = sampler.batch(len(steps) + 1, Phases(draw=False))
        except EngineError:
            continue
        ledger.count(groups)
        steps.append([group[0].prompt.id for group in groups.rollouts])
    assert ledger.dispatched == ledger.trained + ledger.dropped_equal + ledger.in_flight
    assert polls[0] >= fails_at, "it was not interrupted"
    return steps


@pytest.mark.parametrize("fails_at", [1, 2])
@pytest.mark.parametrize(
    "rollout",
    [{}, {"max_resampling_rounds": 2}, {"max_staleness": 1}],
    ids=["plain", "resampling", "ahead"],
)
def test_a_batch_that_an_engine_failure_interrupts_has_the_same_prompts(rollout, fails_at):
    assert sampled(fails_at, **rollout) == sampled(0, **rollout)


# -- a real engine -------------------------------------------------------------------------------


def make_engine(folder: Path, loop: LoopThread, **changes):
    from megatron_espo.rollout.vllm_engine import VLLMEngine

    settings = {"temperature": 1.0, "timeout_s": 120.0} | changes
    return VLLMEngine(engine_config(folder / "model", folder, **settings), loop)


def update(engine, model, version: int, send: bool = True):
    """Send the weights of ``model`` and serve them. Without ``send``, only prepare it."""
    from vllm.distributed.weight_transfer.base import ModuleSource

    from megatron_espo.rollout.transport import make_trainer_transport, send_weights

    source = ModuleSource(model)
    engine.wait_ready()
    transport = make_trainer_transport("files", engine=engine, source=source, rank=0)
    engine.fill_nan([(meta.name, tuple(meta.shape)) for meta in source.metadata()])
    if send:
        send_weights(transport, engine, version)
        engine.resume()
        engine.serve()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    save_tiny_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)


def assert_sampled_from(model, found, version: int) -> None:
    assert set(found.versions.tolist()) == {version}
    with torch.no_grad():
        logprobs = (
            model(torch.tensor([[*PROMPT, *found.token_ids.tolist()]])).logits[0].log_softmax(-1)
        )
    expected = logprobs[len(PROMPT) - 1 : -1].gather(
        -1, torch.tensor(found.token_ids)[:, None].long()
    )[:, 0]
    torch.testing.assert_close(torch.tensor(found.logprobs), expected, atol=1e-4, rtol=0)


@slow
def test_no_request_is_answered_before_whole_weights_are_served(loop, folder, model):
    """Weights may be random, NaN or partly updated, or an update failed. Also tests the key."""
    engine = make_engine(folder, loop)
    pool = EnginePool(str(folder), 120.0)
    engine.start()
    try:
        engine.wait_ready()
        stranger, owner = (HttpClient(engine.address, key) for key in ("0" * 64, run_key(folder)))
        paths = ("/v1/completions", "/pause", "/collective_rpc", "/update_weights", "/sleep")
        for path in (*paths, f"{PREFIX}/generate"):
            with pytest.raises(EngineError, match="401"):
                loop.run(stranger.call(path, {}))
        loop.run(pool.connect([engine.address]))
        replies = [loop.submit(pool.generate("random", PROMPT, SAMPLING))]
        update(engine, model, 3, send=False)
        replies.append(loop.submit(pool.generate("nan", PROMPT, SAMPLING)))
        with pytest.raises(EngineError, match="409"):
            loop.run(owner.generate("canary", PROMPT, SAMPLING, canary=True))
        engine.start_weight_update()
        replies.append(loop.submit(pool.generate("half", PROMPT, SAMPLING)))
        with pytest.raises(EngineError, match="409"):
            loop.run(owner.call("/resume", {}))
        time.sleep(1.0)
        assert not any(reply.done() for reply in replies)
        engine.close()
        assert engine.state == "dead"
        wait_until(lambda: pool.failure is not None, "the pool detects the failure", 10)
        engine.start()
        update(engine, model, 3)
        loop.run(pool.connect([engine.address]))
        for reply in replies:
            assert_sampled_from(model, reply.result(60), 3)
        for client in (stranger, owner):
            loop.run(client.close())
    finally:
        loop.run(pool.close())
        engine.close()


def workers_of(server: int) -> list[int]:
    """Worker processes of the API server, without Python's resource tracker."""
    found = subprocess.run(
        ["pgrep", "-g", str(server), "-f", "Worker|spawn_main"], capture_output=True, text=True
    ).stdout.split()
    return [int(pid) for pid in found if int(pid) != server]


FAULTS = {
    "the API process, with EngineCore inside, is killed": (1, signal.SIGKILL),
    "it is stopped": (1, signal.SIGSTOP),
    "a worker is killed": (2, signal.SIGKILL),
    "a worker is stopped": (2, signal.SIGSTOP),
}


@slow
@pytest.mark.parametrize("workers", [1, 2])
def test_requests_survive_a_process_that_is_killed_or_stopped(loop, folder, model, workers):
    engine = make_engine(folder, loop, tensor_parallel_size=workers)
    pool = EnginePool(str(folder), 8.0)
    try:
        version, replies = 0, []
        for what, (engines, number) in FAULTS.items():
            if engines != workers:
                continue
            engine.start()
            update(engine, model, version)
            loop.run(pool.connect([engine.address]))
            for reply in replies:
                assert_sampled_from(model, reply.result(60), version)
            victim = engine._server.pid if workers == 1 else workers_of(engine._server.pid)[-1]
            os.kill(victim, signal.SIGSTOP)  # so that the requests are in flight when it is killed
            replies = [
                loop.submit(pool.generate(f"{version}-{i}", PROMPT, SAMPLING)) for i in range(3)
            ]
            time.sleep(0.5)
            os.kill(victim, number)
            wait_until(lambda: pool.failure is not None, "the pool detects the failure", 30)
            assert not any(reply.done() for reply in replies), what
            engine.close()
            version += 1
        engine.start()
        update(engine, model, version)
        loop.run(pool.connect([engine.address]))
        for reply in replies:
            assert_sampled_from(model, reply.result(60), version)
    finally:
        loop.run(pool.close())
        engine.close()


# -- a whole run ---------------------------------------------------------------------------------

STEPS, PROMPTS, AHEAD = 5, 4, 2


@slow
def test_a_run_goes_on_after_its_engine_is_killed_in_training_update_and_rollout(tmp_path):
    """Each prompt is trained once, no token is too old, and a replay is bitwise equal."""
    save_tiny_model(tmp_path / "model")
    rollout = {
        "prompts_per_step": PROMPTS,
        "max_response_tokens": 24,
        "max_staleness": 1,
        "over_sampling_prompts": AHEAD,
    }
    write_tiny_run(
        tmp_path,
        run={"steps": STEPS, "checkpoint_every": STEPS, "keep_rollouts": True},
        algorithm={"rollout_correction": "token"},
        rollout=rollout,
    )
    runs = Runs(tmp_path, STEPS)
    done = runs.train("killed", fault="backward:0:2:engine,serve:0:3:engine,rollout:0:4:engine")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("restarting the rollout engine") == 3, done.stdout
    lines = [
        json.loads(line)
        for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["sync/restarts"] for line in lines] == [0, 1, 1, 0, 0]
    assert lines[-1]["ledger/trained"] == PROMPTS * STEPS and lines[-1]["ledger/in_flight"] == AHEAD
    assert (
        lines[-1]["ledger/dispatched"] == PROMPTS * STEPS + AHEAD
        and lines[-1]["ledger/dropped_equal"] == 0
    )
    log = RolloutLog(tmp_path / "killed" / "rollouts", {})
    steps = [log.read(step, None)[0] for step in range(1, STEPS + 1)]
    assert all(groups.max_staleness(step) in (0, 1) for step, groups in enumerate(steps, 1))
    state = json.loads(
        (tmp_path / "killed" / "checkpoints" / f"step_{STEPS:06d}" / "state.json").read_text()
    )
    seen = [group[0].prompt.id for groups in steps for group in groups.rollouts] + [
        entry["id"] for entry in state["rollouts"]["pending"]
    ]
    assert sorted(seen) == sorted(first_prompts(tmp_path, PROMPTS * STEPS + AHEAD))
    again = runs.train("again", f"run.replay={tmp_path / 'killed' / 'rollouts'}")
    assert again.returncode == 0, again.stdout + again.stderr
    one, other = runs.weights("killed"), runs.weights("again")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def first_prompts(folder: Path, count: int) -> list[str]:
    config = load_config(str(folder / "run.yaml"), ["run.dir=x"])
    tokenizer = load_tokenizer(config.model.path, config.model.path)
    stream = PromptStream(
        config.data, tokenizer, config.run.seed, max_response_tokens=24, max_model_len=128
    )
    return [prompt.id for prompt in stream.take(count)]
