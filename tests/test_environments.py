"""Environments: only sampled tokens are trained; tools, limits, splits."""

import asyncio
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import tool_use
from megatron_espo.errors import InputError
from megatron_espo.files import read_jsonl
from megatron_espo.rollout import pool as pool_module
from megatron_espo.rollout import runner as runner_module
from megatron_espo.rollout.engine import EngineError, Generation, Sampling
from megatron_espo.rollout.environments import Policy, SingleTurn, TrajectoryBuilder
from megatron_espo.rollout.http_client import LoopThread
from megatron_espo.rollout.runner import EnvironmentRunner, close_environment, load_environment
from megatron_espo.rollout.tools import PythonTool, ToolEnvironment, ToolError, calculate
from megatron_espo.types import Prompt, SamplingMask, Trajectory
from tests.support.distributed import ROOT
from tests.support.trajectories import values_of

EOS = 0


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def decode(ids: Sequence[int]) -> str:
    return "".join(chr(token) for token in ids if token != EOS)


def render(messages: list[dict[str, str]]) -> list[int]:
    ids = []
    for message in messages:
        ids += [*encode(f"{message['role']}:{message['content']}"), EOS]
    return [*ids, *encode("assistant:")]


@dataclass
class FakeSource:
    """Samples the given texts in order. Log-probs and versions number
    the tokens; the expert of a token is its id modulo 256. With top-k two ids are kept.

    Attributes:
        turns: texts; each ends with the end-of-sequence token.
        abort_after: a request is aborted after so many tokens; 0: never.
        requests: ``(request_id, token_ids, sampling)`` of every call.
        sampled: ids that were returned.
    """

    turns: list[str]
    abort_after: int = 0
    requests: list[tuple[str, list[int], Sampling]] = field(default_factory=list)
    sampled: list[list[int]] = field(default_factory=list)
    rest: list[int] = field(default_factory=list)
    holds: int = 0
    connected: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.connected.set()

    async def generate(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: Sampling,
    ) -> Generation:
        await asyncio.sleep(0)
        self.requests.append((request_id, list(token_ids), sampling))
        ids = self.rest or [*encode(self.turns.pop(0)), EOS]
        self.rest = []
        stop = next(
            (i + 1 for i, token in enumerate(ids) if token in sampling.stop_token_ids), len(ids)
        )
        limit = min(sampling.max_tokens, self.abort_after or sampling.max_tokens)
        reason = "stop"
        if stop > limit:
            stop, reason = limit, "length" if limit == sampling.max_tokens else "abort"
            self.rest = ids[stop:] if reason == "abort" else []
        ids = ids[:stop]
        count = sum(map(len, self.sampled))
        numbers = np.arange(count + 1, count + 1 + len(ids))
        self.sampled.append(ids)
        experts = np.array([*token_ids, *ids], np.int32)[:-1, None, None] % 256
        experts = experts if sampling.routed_experts else None
        mask = None
        if sampling.top_k:
            kept = np.array([[token, token + 256] for token in ids], np.int32)
            mask = SamplingMask(kept.reshape(-1), np.full(len(ids), 2, np.int32))
        return Generation(
            np.array(ids, np.int32),
            -numbers.astype(np.float32),
            numbers.astype(np.int32),
            reason,
            experts,
            mask,
        )


def make_prompt(text: str = "Q") -> Prompt:
    return Prompt("row", text, "36", tuple(encode(text)))


def make_policy(source: FakeSource, **changes) -> Policy:
    settings = {"max_tokens": 1000, "seed": 5, "stop_token_ids": (EOS,)} | changes
    length = settings.pop("max_model_len", 2000)
    tokenizer = SimpleNamespace(
        encode=settings.pop("encode", encode), decode=decode, encode_prompt=render
    )
    return Policy(source, "0", Sampling(**settings), length, tokenizer)


def run(environment, source: FakeSource, prompt: Prompt | None = None, **changes) -> Trajectory:
    return asyncio.run(environment.rollout(prompt or make_prompt(), make_policy(source, **changes)))


def trained(part: Trajectory) -> list[int]:
    return part.response_ids[part.loss_mask].tolist()


def check_lines_up(found: Trajectory, sampled: list[list[int]]) -> None:
    """The trained tokens are the sampled ones, in order, each with its log-prob and version."""
    assert sum(map(trained, found.parts), []) == sum(sampled, [])
    numbers = np.concatenate([part.versions[part.loss_mask] for part in found.parts])
    np.testing.assert_array_equal(numbers, np.arange(1, len(numbers) + 1))
    for part in found.parts:
        np.testing.assert_array_equal(part.logprobs[part.loss_mask], -part.versions[part.loss_mask])
        assert not part.logprobs[~part.loss_mask].any()
        assert (part.versions[~part.loss_mask] == -1).all()
        starts = np.flatnonzero(np.diff(part.loss_mask, prepend=False) & part.loss_mask)
        assert set(starts) <= set(part.turns) and part.loss_mask[part.turns].all()


def check_mask(part: Trajectory) -> None:
    """The ids that were kept for the sampled tokens; none for the others."""
    np.testing.assert_array_equal(part.sampling_mask.counts, 2 * part.loss_mask)
    assert part.sampling_mask.ids[::2].tolist() == trained(part)


# ---- builder, policy

words = st.text(alphabet="abc<>/ 12", min_size=1, max_size=6)


@given(
    st.lists(
        st.tuples(words, words, st.sampled_from(["append", "history", "other history"])),
        min_size=1,
        max_size=6,
    )
)
def test_random_dialogues_train_what_was_sampled(dialogue):
    source = FakeSource([turn for turn, _, _ in dialogue])
    prompt, splits = make_prompt(), 0

    async def rollout() -> Trajectory:
        nonlocal splits
        policy = make_policy(source, routed_experts=True, top_k=2)
        builder = TrajectoryBuilder(prompt)
        for _, observation, way in dialogue:
            found = await policy.generate(builder.context)
            builder.add_turn(found)
            if way == "append":
                builder.add_observation(encode(observation))
            else:
                history = builder.context if way == "history" else [7, *builder.context]
                builder.set_context([*history, *encode(observation)])
                splits += way != "history"
        return builder.build("text", "stop")

    found = asyncio.run(rollout())
    check_lines_up(found, source.sampled)
    assert len(found.earlier) == splits
    contexts = [context for _, context, _ in source.requests]
    # Every turn was sampled after the very ids that are trained, with the engine's experts.
    for part in found.parts:
        ids = [*part.prompt_ids.tolist(), *part.response_ids.tolist()]
        for turn in part.turns:
            assert contexts.pop(0) == ids[: len(part.prompt_ids) + turn]
        if len(part.turns):
            np.testing.assert_array_equal(part.routed_experts[:, 0, 0], np.array(ids[:-1]) % 256)
            check_mask(part)
            assert part.loss_mask[-1]


@given(st.integers(1, 7), st.text(alphabet="abc", min_size=1, max_size=20), st.integers(1, 25))
def test_an_aborted_turn_is_continued(abort_after, text, max_tokens):
    source, whole = FakeSource([text], abort_after), FakeSource([text])
    found = run(SingleTurn(), source, max_tokens=max_tokens, routed_experts=True, top_k=2)
    check_mask(found)
    expected = run(SingleTurn(), whole, max_tokens=max_tokens, routed_experts=True)
    assert values_of(found) == values_of(expected)
    np.testing.assert_array_equal(found.routed_experts, expected.routed_experts)
    done = 0
    for (_, context, sampling), ids in zip(source.requests, source.sampled, strict=True):
        assert context == [*encode("Q"), *found.response_ids[:done].tolist()]
        assert sampling.max_tokens == max_tokens - done
        done += len(ids)
    seeds = [sampling.seed for _, _, sampling in source.requests]
    names = [name for name, _, _ in source.requests]
    assert seeds[0] == 5 and len(set(seeds)) == len(seeds) == len(set(names))


def test_turns_have_different_seeds_and_the_same_in_every_run():
    def seeds(seed: int | None) -> list[int | None]:
        source = FakeSource(["<tool>1</tool>"] * 3)
        run(ToolEnvironment(max_turns=3), source, seed=seed)
        return [sampling.seed for _, _, sampling in source.requests]

    assert len(set(seeds(5))) == 3 and seeds(5) == seeds(5) != seeds(6)
    assert seeds(None) == [None] * 3


def test_a_context_without_room_is_an_error():
    with pytest.raises(ValueError, match="no room"):
        run(SingleTurn(), FakeSource(["a"]), max_model_len=1)


# ---- runner


@pytest.fixture
def loop():
    loop = LoopThread()
    yield loop
    loop.close()


def make_runner(loop, rollout, source=None, timeout_s=None) -> EnvironmentRunner:
    tokenizer = SimpleNamespace(encode=encode, decode=decode, encode_prompt=render)
    environment = SimpleNamespace(rollout=rollout)
    source = source or FakeSource(["a" * 9] * 9)
    return EnvironmentRunner(environment, source, tokenizer, loop, timeout_s, 1000)


def start(runner, samples=1, max_tokens=20) -> list:
    sampling = Sampling(max_tokens, stop_token_ids=(EOS,))
    return runner.start(make_prompt(), "n", sampling, range(samples))


async def raises(error: BaseException) -> None:
    raise error


async def nested(error: BaseException) -> None:
    await asyncio.gather(raises(error), asyncio.sleep(0))


@pytest.mark.parametrize("stop", [raises, nested])
def test_an_exit_fails_one_attempt(loop, stop):
    async def rollout(prompt, policy):
        if policy.name in ("n.0.0.0", "n.1.0.0", "n.1.1.0"):
            await stop(SystemExit(1))
        return await SingleTurn().rollout(prompt, policy)

    runner = make_runner(loop, rollout)
    found = [future.result(5) for future in start(runner, 3)]
    assert [sample.failed for sample in found] == [False, True, False]
    assert runner.failures == {"SystemExit": 3} and "prompt 'row'" in runner.last_failure


def test_the_time_limit_leaves_out_restarts_of_engines(loop, tmp_path, monkeypatch, caplog):
    class Client(FakeSource):
        address = "engine"

        async def generate(self, *arguments) -> Generation:
            if self.turns:
                return await super().generate(*arguments)
            raise EngineError("it died")

        async def close(self) -> None:
            pass

    client = Client([])
    monkeypatch.setattr(pool_module, "HttpClient", lambda *_: client)
    engines = pool_module.EnginePool(str(tmp_path), 900.0)
    loop.run(engines.connect(["engine"]))
    runner = make_runner(loop, SingleTurn().rollout, engines, timeout_s=0.3)
    futures = start(runner, 2)
    time.sleep(1)
    client.turns = ["a"] * 2
    loop.run(engines.connect(["engine"]))
    assert [future.result(5).text for future in futures] == ["a", "a"] and not runner.failures

    runner = make_runner(loop, lambda *_: asyncio.sleep(60), engines, timeout_s=0.1)
    assert start(runner)[0].result(5).failed and runner.failures == {"TimeoutError": 2}
    assert "environment.timeout_s" in caplog.text
    loop.run(engines.close())


def test_a_trajectory_above_the_limits_is_a_failed_attempt(loop):
    """Too many tokens in all its parts; rewards that float32 cannot hold."""

    async def rollout(prompt, policy, **built):
        builder = TrajectoryBuilder(prompt)
        builder.add_turn(await policy.generate(builder.context))
        builder.set_context([7])
        builder.add_turn(await policy.generate(builder.context))
        return builder.build("", **built)

    def failed(max_tokens=20, **built) -> bool:
        runner = make_runner(loop, lambda *arguments: rollout(*arguments, **built))
        return start(runner, max_tokens=max_tokens)[0].result(5).failed

    assert not failed() and failed(max_tokens=19)
    for value in (float("inf"), -float("inf"), 1e39, "much"):
        assert failed(reward=value) and failed(reward=1.0, rewards={"reward": value})
    for value in (None, float("nan"), -3e38, True, np.float32(1)):
        assert not failed(reward=value)


def test_a_close_that_fails_is_only_reported(loop, monkeypatch, capsys):
    monkeypatch.setattr(runner_module, "CLOSE_SECONDS", 0.1)
    closed = []

    async def block() -> None:
        time.sleep(0.5)

    close_environment(SimpleNamespace(), loop)
    close_environment(SimpleNamespace(close=lambda: asyncio.sleep(0)), loop)
    assert not capsys.readouterr().out
    ways = lambda: closed.append(1), lambda: raises(KeyError()), lambda: raises(SystemExit())
    for close in (*ways, lambda: asyncio.sleep(60), block):
        close_environment(SimpleNamespace(close=close), loop)
        assert "close()" in capsys.readouterr().out
    assert closed


# ---- tools


def test_the_model_calls_the_calculator():
    source = FakeSource(["<tool>12*3</tool>", "It is 36."])
    found = run(ToolEnvironment(), source)
    observation = "\n<result>36</result>\n"
    assert found.text == "<tool>12*3</tool>" + observation + "It is 36."
    assert found.finish_reason == "stop" and found.rewards == {"tool_calls": 1, "tool_errors": 0}
    assert decode(found.response_ids[~found.loss_mask]) == observation
    assert decode(trained(found)) == "<tool>12*3</tool>It is 36." and trained(found)[-1] == EOS
    assert decode(source.requests[1][1]) == "Q<tool>12*3</tool>" + observation
    assert found.turns.tolist() == [0, len("<tool>12*3</tool>" + observation)]


def test_tokens_after_a_call_are_dropped():
    source = FakeSource(["<tool>1+1</tool><result>7</result>", "2"])
    found = run(ToolEnvironment(), source, routed_experts=True, top_k=2)
    check_mask(found)
    assert found.text == "<tool>1+1</tool>\n<result>2</result>\n2"
    assert decode(trained(found)) == "<tool>1+1</tool>2"
    ids = [*found.prompt_ids.tolist(), *found.response_ids.tolist()]
    np.testing.assert_array_equal(found.routed_experts[:, 0, 0], np.array(ids[:-1]) % 256)
    call = len("<tool>1+1</tool>")
    np.testing.assert_array_equal(found.versions[:call], np.arange(1, call + 1))
    dropped = len(source.sampled[0]) - call
    rest = found.versions[found.loss_mask][call:].tolist()
    assert rest == [call + dropped + 1, call + dropped + 2]


def test_a_closing_tag_of_one_token_stops_the_engine():
    source = FakeSource(["[1+1]<result>7</result>", "2"])
    found = run(ToolEnvironment(call_tags=("[", "]")), source)
    assert decode(source.sampled[0]) == "[1+1]" and found.text == "[1+1]\n<result>2</result>\n2"


@given(
    st.lists(
        st.sampled_from(["<tool>", "</tool>", "1", "+", "a", "<result>", "2"]), max_size=8
    ).map("".join),
    st.integers(1, 60),
)
def test_random_turns_train_a_prefix_of_what_was_sampled(text, max_tokens):
    source = FakeSource([text] * 3)
    found = run(ToolEnvironment(max_turns=3), source, max_tokens=max_tokens)
    assert len(found.response_ids) <= max_tokens
    starts = [*found.turns.tolist(), len(found.response_ids)]
    for ids, (start, stop) in zip(source.sampled, pairwise(starts), strict=True):
        kept = found.response_ids[start:stop][found.loss_mask[start:stop]].tolist()
        assert kept == ids[: len(kept)]
        call = re.search("<tool>(.*?)</tool>", decode(ids))
        assert len(kept) == (len(ids) if call is None else call.end())
    np.testing.assert_array_equal(found.logprobs[found.loss_mask], -found.versions[found.loss_mask])
    assert found.finish_reason == ("stop" if trained(found)[-1] == EOS else "length")


def test_limits_of_turns_and_tokens():
    call = "<tool>1</tool>"
    found = run(ToolEnvironment(max_turns=2), FakeSource([call] * 2))
    assert found.text == f"{call}\n<result>1</result>\n{call}" and found.finish_reason == "length"
    found = run(ToolEnvironment(max_turn_tokens=3), FakeSource(["12345"]))
    assert found.text == "123" and found.finish_reason == "length"
    # The result does not fit.
    found = run(ToolEnvironment(), FakeSource([call, "abc"]), max_tokens=len(call) + 5)
    assert found.text == call and found.finish_reason == "length"
    assert found.rewards["tool_calls"] == 1
    found = run(ToolEnvironment(), FakeSource(["abcdef"]), max_model_len=4)
    assert found.text == "abc" and found.finish_reason == "length"


def test_calculator():
    values = {"12*3": 36, " 7 / 2": 3.5, "-(2+3)**2": -25, "7//2 + 7%4": 6, "+123*456": 56088}
    values |= {
        "1**1000": 1,
        "(-1)**1001": -1,
        "0.5**1000": 0.5**1000,
        "1.0000001**500": 1.0000001**500,
    }
    assert {expression: calculate(expression) for expression in values} == values


def test_the_calculator_rejects_other_expressions():
    wrong = ["", "a", "1/0", "9**9**9", "2**1000", "0**-1", "(-8)**0.5", "1e308*10", "True"]
    wrong += ["'a'*3", "[1]*9", "f(1)", "1 if 1 else 2", "__import__('os')", "(" * 99 + "1"]
    for expression in [*wrong, "1+" * 99 + "1+1", "1e99*1e99"]:
        with pytest.raises(ToolError):
            calculate(expression)


def test_results_of_the_calculator_have_15_digits():
    found = run(ToolEnvironment(), FakeSource(["<tool>12345678901.5*2</tool>", "."]))
    assert "<result>24691357803</result>" in found.text


def test_call_tags_that_are_special_tokens_are_refused():
    """The decoder drops special tokens, so no text would have a call."""
    for tags in (("<\0", ">"), ("<", "\0")):
        with pytest.raises(InputError, match="environment.args: .*call_tags"):
            run(ToolEnvironment(call_tags=tags), FakeSource(["a"]))


def test_a_refused_call_is_an_observation():
    found = run(ToolEnvironment(), FakeSource(["<tool>1/0</tool>", "?"]))
    assert "<result>error: division by zero</result>" in found.text
    assert found.rewards == {"tool_calls": 1, "tool_errors": 1}


def test_python_runs_and_the_event_loop_goes_on():
    environment = ToolEnvironment("python", tool_args={"timeout_s": 4.0, "processes": 3})
    calls = {
        "print(6*6)": "36",
        "while True: pass": "error: no result in 4 s",
        "1/0": "error: ZeroDivisionError: division by zero",
        "print('x' * 10**7)": "error: OSError",
        "x = bytearray(2 << 30)": "error: MemoryError",
        "def f(n):\n    return n and n + f(n - 1)\nprint(f(4))": "10",
    }

    async def several() -> tuple[list[Trajectory], float]:
        sources = [FakeSource([f"<tool>{call}</tool>", "!"]) for call in calls]
        task = asyncio.gather(
            *(environment.rollout(make_prompt(), make_policy(source)) for source in sources)
        )
        slowest, before = 0.0, time.monotonic()
        while not task.done():
            await asyncio.sleep(0.01)
            slowest, before = max(slowest, time.monotonic() - before), time.monotonic()
        return await task, slowest

    found, slowest = asyncio.run(several())
    for trajectory, expected in zip(found, calls.values(), strict=True):
        assert f"<result>{expected}" in trajectory.text
    assert slowest < 10.0


def test_python_is_killed_with_a_cancelled_rollout(tmp_path):
    async def cancelled() -> None:
        tool = PythonTool(isolate=False)
        write = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
        task = asyncio.create_task(tool(f"import os, time\n{write}\ntime.sleep(60)"))
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert not task.done()
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    start = time.monotonic()
    asyncio.run(cancelled())
    assert time.monotonic() - start < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


# ---- names, documentation, example


def test_the_example_of_tool_use():
    rows = read_jsonl(ROOT / "examples" / "tool_use.jsonl")
    assert rows == list(tool_use.rows())
    first, second = re.findall(r"\d+", rows[0]["prompt"][-1]["content"])
    answer = rows[0]["answer"]
    prompt = Prompt("row", "", answer, (1,))
    found = run(
        ToolEnvironment(max_turns=3),
        FakeSource([f"<tool>{first} * {second}</tool>", f"It is {answer}."]),
        prompt,
    )
    assert tool_use.correct(prompt, found.text) == 1
    source = FakeSource([f"<tool>{first} * {second}</tool>", "?"])
    wrong = run(ToolEnvironment(), source, prompt).text
    assert [tool_use.correct(prompt, text) for text in (wrong, "7", "")] == [0, 0, 0]


def test_load_environment():
    assert isinstance(load_environment("single_turn", {}), SingleTurn)
    assert isinstance(load_environment("tool", {"max_turns": 2}), ToolEnvironment)
    name = "megatron_espo.rollout.tools:ToolEnvironment"
    assert isinstance(load_environment(name, {}), ToolEnvironment)


@pytest.mark.parametrize(
    "name, arguments, key",
    [
        ("nothing", {}, "environment.name"),
        ("no.such.module:Class", {}, "environment.name"),
        ("megatron_espo.rollout.tools:Missing", {}, "environment.name"),
        ("single_turn", {"max_turns": 2}, "environment.args"),
        ("tool", {"turns": 2}, "environment.args"),
        ("tool", {"tool": "browser"}, "environment.args"),
        ("tool", {"max_turns": 0}, "environment.args"),
        ("tool", {"tool_args": {"timeout_s": 1}}, "environment.args"),
    ],
)
def test_load_environment_refuses(name, arguments, key):
    with pytest.raises(InputError, match=key):
        load_environment(name, arguments)


def test_the_documented_example_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "environments.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_environments.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # restored afterwards
    assert "my_environments:AskTwice" in page
    source = FakeSource(["35", "36"])
    found = run(load_environment("my_environments:AskTwice", {}), source)
    check_lines_up(found, source.sampled)
    assert found.text == "36" and len(found.turns) == 2 and not found.loss_mask.all()
