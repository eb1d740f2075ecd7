"""Fakes for a Sampler: a token source that a test controls, a reward pool without processes."""

import asyncio
import json
import random
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np

from megatron_espo.config import Reward, Rollout, Run
from megatron_espo.data.scored_groups import ScoredGroups
from megatron_espo.monitoring.progress import Phases
from megatron_espo.rollout.engine import Generation, Sampling
from megatron_espo.rollout.environments import SingleTurn
from megatron_espo.rollout.http_client import LoopThread
from megatron_espo.rollout.runner import EnvironmentRunner
from megatron_espo.rollout.sampler import Sampler
from megatron_espo.rollout.scorer import Scorer
from megatron_espo.types import Prompt, Trajectory

EOS = 2
TOKENIZER = SimpleNamespace(
    encode=lambda text: [3],
    encode_prompt=lambda prompt: [int(prompt), 1],
    render=lambda prompt: prompt,
    decode=lambda ids: " ".join(map(str, ids)),
    vocab_size=1 << 20,
    has_chat_template=False,
    eos_ids=frozenset({EOS}),
)


class FakeSource:
    """Replaces an ``EnginePool``; responses are a function of context and seed.

    Requests finish one at a time while ``release()`` is open, in the order of ``order``. The first
    half of a response has the policy version at the request's arrival, the rest the version at its
    end, as after a weight update in flight.

    Args:
        loop: where it runs.
        order: sort key of a request, from its context and seed.

    Attributes:
        version: policy version that samples.
        held: first context tokens of requests that do not finish.
        failure: what ``check`` raises; requests wait meanwhile, as in ``EnginePool``.
        requests: contexts of all requests in the order of their arrival.
    """

    holds = 0

    def __init__(
        self,
        loop: LoopThread,
        order: Callable[[tuple[int, ...], int], float] = lambda ids, seed: 0.0,
    ) -> None:
        self.version, self.held, self.failure, self.requests = 0, set(), None, []
        self.connected = asyncio.Event()
        self.connected.set()
        self._order, self._open, self._waiting = order, False, {}
        self._task = loop.submit(self._finish())

    async def generate(self, request_id, token_ids, sampling: Sampling) -> Generation:
        context = tuple(token_ids)
        assert request_id not in self._waiting, "request ids are unique"
        self.requests.append(context)
        began, done = self.version, asyncio.get_running_loop().create_future()
        self._waiting[request_id] = (
            self._order(context, sampling.seed or 0),
            len(self.requests),
            context[0],
            done,
        )
        try:
            is_aborted = await done
        finally:
            del self._waiting[request_id]
        ids = response(context, sampling)
        cut = len(ids) // 2
        if is_aborted and cut:
            return _generation(ids[:cut], [began] * cut, "abort")
        reason = "stop" if ids[-1] in sampling.stop_token_ids else "length"
        return _generation(ids, [began] * cut + [self.version] * (len(ids) - cut), reason)

    def check(self) -> None:
        """Raise ``failure``; another call goes on."""
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    @contextmanager
    def release(self):
        """Requests finish inside."""
        self._open = True
        try:
            yield
        finally:
            self._open = False

    async def abort_all(self) -> None:
        for *_, done in self._waiting.values():
            if not done.done():
                done.set_result(True)

    def close(self) -> None:
        self._task.cancel()

    async def _finish(self) -> None:
        while True:
            await asyncio.sleep(0.0005)
            ready = [
                entry
                for entry in self._waiting.values()
                if entry[2] not in self.held and not entry[3].done()
            ]
            if self._open and ready:
                min(ready)[3].set_result(False)


def response(context: tuple[int, ...], sampling: Sampling) -> list[int]:
    """Random tokens, ended by the first of ``stop_token_ids`` or by the limit."""
    draw = random.Random(f"{context} {sampling.seed}")
    ids: list[int] = []
    while len(ids) < sampling.max_tokens and not (ids and ids[-1] in sampling.stop_token_ids):
        ids.append(draw.randrange(EOS, 10))
    return ids


def _generation(ids: list[int], versions: list[int], reason: str) -> Generation:
    return Generation(
        np.array(ids, np.int32),
        np.full(len(ids), -1.0, np.float32),
        np.array(versions, np.int32),
        reason,
    )


class FakePhases(Phases):
    """Phases without a bar, whose ``rollout`` lets requests of ``source`` finish."""

    def __init__(self, source: FakeSource) -> None:
        super().__init__(draw=False)
        self._source = source

    @contextmanager
    def phase(self, name, step, steps, *check):
        with super().phase(name, step, steps, *check) as on_progress:
            if name != "rollout":
                yield on_progress
                return
            with self._source.release():
                yield on_progress


class FakeRewards(Scorer):
    """A scorer without workers, which scores at once.

    Args:
        judge: ``(prompt, text)`` -> reward; ``None``: the verifier failed.

    Attributes:
        judged: the scored pairs, in order.
    """

    def __init__(self, judge: Callable[[Prompt, str], float | None]) -> None:
        self._reward, self._judge = Reward(), None
        self._pools = {"fake": SimpleNamespace(last_failure="boom")}
        self.judge, self.judged = judge, []

    def submit(self, found: Trajectory) -> Future:
        self.judged.append((found.prompt, found.text))
        future = Future()
        future.set_result(found.with_reward(self.judge(found.prompt, found.text)))
        return future


class Numbers:
    """A prompt stream: 0, 1, 2, ... without filters."""

    skipped = 0

    def __init__(self) -> None:
        self.position = 0

    def take(self, n: int) -> list[Prompt]:
        self.position += n
        return self.find(range(self.position - n, self.position))

    def find(self, ids) -> list[Prompt]:
        return [Prompt(str(number), str(number), "", (int(number), 1)) for number in ids]

    def note_solved(self, prompt: Prompt) -> None:
        pass

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]


class FakeRun:
    """A real Sampler and a real EnvironmentRunner between fakes. Close it.

    Args:
        rollout: settings.
        judge: see :class:`FakeRewards`.
        order: see :class:`FakeSource`.
        check: polled while the sampler waits; ``None``: the source's.
        stream: of prompts; ``None``: :class:`Numbers`.
    """

    def __init__(
        self, rollout: Rollout, judge, *, order=lambda ids, seed: 0.0, check=None, stream=None
    ) -> None:
        self.loop = LoopThread()
        self.source, self.rewards = FakeSource(self.loop, order), FakeRewards(judge)
        self.phases, self.stream = FakePhases(self.source), stream or Numbers()
        self.runner = EnvironmentRunner(SingleTurn(), self.source, TOKENIZER, self.loop, None, 64)
        config = SimpleNamespace(rollout=rollout, run=Run(steps=99, seed=1), reward=Reward())
        check = check or self.source.check
        self.sampler = Sampler(config, self.stream, self.runner, self.rewards, check)

    def batch(self, step: int) -> ScoredGroups:
        """The step's batch; then the source has the step's weights."""
        self.source.version = step - 1
        groups = self.sampler.batch(step, self.phases)
        self.source.version = step
        return groups

    def state(self) -> dict:
        """The state as a checkpoint holds it."""
        return json.loads(json.dumps(self.sampler.state_dict()))

    def close(self) -> None:
        self.sampler.close()
        self.source.close()
        self.loop.close()

    def __enter__(self) -> "FakeRun":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def prompt_ids(groups: ScoredGroups) -> list[int]:
    return [int(group[0].prompt.id) for group in groups.rollouts]
