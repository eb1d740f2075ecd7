"""Judges behind a server that misbehaves, and weighted sums of rewards."""

import asyncio
import json
import logging
import math
import os
import time
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from aiohttp import web

from megatron_espo.config import checks, load_config
from megatron_espo.errors import InputError
from megatron_espo.monitoring.metrics import rollout_metrics
from megatron_espo.rewards import judge as judge_module
from megatron_espo.rewards.judge import JudgeClient
from megatron_espo.rollout.http_client import LoopThread
from megatron_espo.rollout.scorer import Scorer
from megatron_espo.types import Prompt
from tests.support.trajectories import single_turn

# How the server answers each attempt at a request; the last entry repeats.
KINDS = {
    "good": ["good"],
    "slow": ["slow"],
    "500 once": ["500", "good"],
    "500": ["500"],
    "429 once": ["429", "good"],
    "400": ["400"],
    "no score once": ["no score", "good"],
    "no score": ["no score"],
    "cut": ["cut"],
    "no JSON once": ["no JSON", "good"],
    "dropped once": ["dropped", "good"],
    "dropped": ["dropped"],
    "silent": ["silent"],
    "surrogate": ["surrogate"],
}
CAUSES = {
    "500": "status_500",
    "429": "status_429",
    "400": "status_400",
    "no score": "no_score",
    "cut": "no_score",
    "no JSON": "no_score",
    "dropped": "no_connection",
    "silent": "timeout",
}
RETRIES, TIMEOUT_S = 1, 3.0


class Server:
    """A chat server. A prompt ``<kind>|<number>`` chooses the answer; the score is number % 11.

    Attributes:
        arrivals: times of the requests by prompt.
        most: largest number of slow requests at the same time.
        headers: of the latest request.
    """

    def __init__(self) -> None:
        self.arrivals: dict[str, list[float]] = {}
        self.most = self._now = 0

    @property
    def requests(self) -> int:
        return sum(map(len, self.arrivals.values()))

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.headers, self.body = request.headers, await request.json()
        text = self.body["messages"][0]["content"]
        times = self.arrivals.setdefault(text, [])
        times.append(time.monotonic())
        kind, _, number = text.partition("|")
        behaviours = KINDS.get(kind, ["good"])
        behaviour = behaviours[min(len(times), len(behaviours)) - 1]
        reply = f"Score: 99. No. **Score:** {int(number or 0) % 11}/10"
        if behaviour == "slow":
            self._now += 1
            self.most = max(self.most, self._now)
            await asyncio.sleep(0.05)
            self._now -= 1
        elif behaviour == "silent":
            await asyncio.sleep(60)
        elif behaviour == "dropped":
            request.transport.close()
        elif behaviour == "no score":
            reply = "I would rather not say."
        elif behaviour == "surrogate":
            reply = f"\ud83d {reply}"
        elif behaviour == "no JSON":
            return web.Response(text="<html>")
        elif behaviour.isdigit():
            echo = self.headers.get("Authorization", "")
            headers = {"Retry-After": "0.2"} if behaviour == "429" else {}
            return web.Response(status=int(behaviour), text=f"refused {echo}", headers=headers)
        reason = "length" if behaviour == "cut" else "stop"
        choice = {"message": {"content": reply}, "finish_reason": reason}
        usage = {"prompt_tokens": 7, "completion_tokens": 3}
        return web.json_response({"choices": [choice], "usage": usage})


@pytest.fixture
def served(tmp_path, monkeypatch):
    """``(loop, server, url)``."""
    monkeypatch.setattr(judge_module, "BACKOFF_S", 0.02)
    server, loop, app = Server(), LoopThread(), web.Application()
    app.router.add_post("/v1/chat/completions", server.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)

    async def serve() -> int:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return site._server.sockets[0].getsockname()[1]

    yield loop, server, f"http://127.0.0.1:{loop.run(serve())}/v1/"
    loop.run(runner.cleanup(), 5.0)
    loop.close()


class FakeTokenizer:
    def decode(self, ids):
        return f"decoded {list(ids)}"


def settings(folder, url="http://none", terms=None, **judge):
    """A configuration of one judge named ``good``."""
    content = {
        "run": {"dir": str(folder)},
        "model": {"path": "none"},
        "data": {"prompts": "reasoning_gym:none"},
        "reward": {"terms": terms or {"good": 1}, "workers": 1},
        "judge": {"url": url, "model": "m", "prompts": {"good": "{response}"}} | judge,
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(content, indent=1))
    return load_config(str(path))


@contextmanager
def scorer(loop, config):
    found = Scorer(config, FakeTokenizer(), loop)
    try:
        yield found
    finally:
        found.close()


def trajectory(text, answer="", metadata=None, rewards=None):
    prompt = Prompt("p", "<|im_start|>text", answer, (5, 6), metadata or {})
    return single_turn(prompt, [1], [0.0], 0, "stop", text, rewards=rewards or {})


def score(rewards, asked):
    return [future.result() for future in [rewards.submit(sample) for sample in asked]]


def rewards_of(found):
    return [sample.reward for sample in found]


def test_a_thousand_requests_to_a_server_that_misbehaves(served, tmp_path, caplog):
    loop, server, url = served
    names = ["silent"] * 8 + [kind for kind in KINDS if kind not in ("silent", "surrogate")] * 20
    names += ["good"] * (1000 - len(names))
    asked = [trajectory(f"{kind}|{i}") for i, kind in enumerate(names)]
    limits = {"timeout_s": TIMEOUT_S, "retries": RETRIES, "max_concurrent": 16}
    config = settings(tmp_path, url, **limits)
    expected, counts = [], Counter()
    for i, kind in enumerate(names):
        for attempt in range(RETRIES + 1):
            behaviour = KINDS[kind][min(attempt + 1, len(KINDS[kind])) - 1]
            counts["requests"] += 1
            counts["retries"] += attempt > 0
            replied = behaviour not in ("500", "429", "400", "no JSON", "dropped", "silent")
            counts["prompt_tokens"] += 7 * replied
            counts["completion_tokens"] += 3 * replied
            if behaviour in ("good", "slow"):
                expected.append(i % 11 / 10)
                break
            counts[CAUSES[behaviour]] += 1
            if behaviour == "400":
                expected.append(None)
                counts["failed"] += 1
                break
        else:
            expected.append(None)
            counts["failed"] += 1
    ends = {}
    with scorer(loop, config) as rewards:
        rewards.start()
        rewards.pop_metrics()
        futures = [rewards.submit(sample) for sample in asked]
        for sample, future in zip(asked, futures, strict=True):
            note = lambda _, text=sample.text: ends.setdefault(text, time.monotonic())  # noqa: E731
            future.add_done_callback(note)
        found = [future.result(60) for future in futures]
        metrics = rewards.pop_metrics()
        failed = sum(reward is None for reward in expected)
        with pytest.raises(InputError, match="600 of 1000 of step 2 failed, .* of the judge: "):
            rewards.check_failures(600, 1000, 2)
        rewards.check_failures(failed, 1000, 2)
    assert len(found) == 1000
    assert [None if math.isnan(r) else r for r in rewards_of(found)] == expected
    assert failed == 20 * 5 + 8 and metrics.pop("judge/cache_hits") == 0
    assert metrics == {f"judge/{name}": count for name, count in counts.items()}
    bound = (RETRIES + 1) * TIMEOUT_S + 1.0
    longest = max(ends[text] - times[0] for text, times in server.arrivals.items() if text in ends)
    assert longest < bound
    # Each cause is logged once.
    causes = [record.args[-1] for record in caplog.records if record.name == judge_module.__name__]
    assert Counter(causes) == Counter(set(causes)) and {"timeout", "no_score"} <= set(causes)

    known = [i for i, reward in enumerate(expected) if reward is not None]
    before = server.requests
    with scorer(loop, config) as rewards:  # another run with the same cache
        rewards.start()
        again = score(rewards, [asked[i] for i in known])
        metrics = rewards.pop_metrics()
    assert server.requests == before + 1  # that of the start
    assert rewards_of(again) == [found[i].reward for i in known]
    assert metrics["judge/cache_hits"] == len(known) and metrics["judge/requests"] == 1


def test_equal_requests_are_sent_once_and_a_broken_cache_costs_only_requests(served, tmp_path):
    loop, server, url = served
    with scorer(loop, settings(tmp_path, url)) as rewards:
        rewards.start()
        found = score(rewards, [trajectory("good|4")] * 8)
        assert rewards_of(found) == [0.4] * 8 and len(server.arrivals["good|4"]) == 1
        assert rewards.pop_metrics()["judge/cache_hits"] == 7
        rewards._judge._cache.close()
        assert rewards_of(score(rewards, [trajectory("good|4")])) == [0.4]
        assert len(server.arrivals["good|4"]) == 2


def test_a_reply_that_the_cache_cannot_hold_is_scored(served, tmp_path):
    loop, _, url = served
    with scorer(loop, settings(tmp_path, url)) as rewards:
        rewards.start()
        assert rewards_of(score(rewards, [trajectory("surrogate|4")])) == [0.4]


def test_the_prompt_is_filled_in_one_pass(served, tmp_path, monkeypatch):
    loop, server, url = served
    monkeypatch.setenv("JUDGE_KEY", "secret-key\n")
    text = r"{prompt}\frac{1}{x} {rubric} {answer} {response}"
    more = {"prompts": {"good": text}, "key": "JUDGE_KEY", "sampling": {"temperature": 0}}
    with scorer(loop, settings(tmp_path, url, **more)) as rewards:
        rewards.start()
        asked = trajectory(r"{answer}\1 {prompt}", "42", {"rubric": ["a", 1], "answer": "no"})
        score(rewards, [asked])
    content = r"decoded [5, 6]\frac{1}{x} ['a', 1] 42 {answer}\1 {prompt}"
    messages = [{"role": "user", "content": content}]
    assert server.body == {"model": "m", "messages": messages, "temperature": 0}
    assert server.headers["Authorization"] == "Bearer secret-key"


def test_the_limits_of_requests(served, tmp_path):
    """At the same time, in a minute, and after Retry-After."""
    loop, server, url = served
    with scorer(loop, settings(tmp_path, url, max_concurrent=3)) as rewards:
        rewards.start()
        score(rewards, [trajectory(f"slow|{i}") for i in range(12)])
        assert server.most == 3
    server.arrivals.clear()
    with scorer(loop, settings(tmp_path, url, requests_per_minute=600)) as rewards:
        rewards.start()
        score(rewards, [trajectory(f"good|{i}") for i in range(10)])
        times = sorted(time for times in server.arrivals.values() for time in times)
        assert times[-1] - times[0] > 0.8 * 10 * 60 / 600
        score(rewards, [trajectory("429 once|3")])
        first, second = server.arrivals["429 once|3"]
        assert second - first > 0.19


def test_several_rewards_are_weighted(served, tmp_path, monkeypatch):
    """Real reward workers and the judge. Whatever fails, the response has no reward."""
    loop, _, url = served
    (tmp_path / "lengths.py").write_text(
        "def length(prompt, response): return None if 'odd' in response else len(response)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = settings(tmp_path, url, {"lengths:length": 0.5, "good": -2}, retries=0)
    with scorer(loop, config) as rewards:
        rewards.start()
        texts = ["good|5", "good|16", "odd|5", "400|1"]
        asked = [trajectory(text, rewards={"env": 1.0}) for text in texts]
        given = trajectory("given").with_reward(7.0)
        found = score(rewards, [*asked, given])
        message = "3 of 4 of step 3 failed, .* of lengths:length: prompt 'p': .*None.*judge: .* 400"
        with pytest.raises(InputError, match=message):
            rewards.check_failures(3, 4, step=3)
    nan = float("nan")
    assert rewards_of(found) == pytest.approx([3 - 1, 3.5 - 1, nan, nan, 7.0], nan_ok=True)
    assert [sample.rewards for sample in found[2:]] == [
        {"env": 1.0, "reward/mean_good": 0.5},
        {"env": 1.0, "reward/mean_length": 5.0},
        {},
    ]
    matrix = torch.tensor([rewards_of(found[:4])])
    metrics = rollout_metrics([found[:4]], matrix, torch.zeros(1, 4))
    assert metrics["reward/mean_good"] == 0.5 and metrics["environment/reward_env"] == 1.0
    assert metrics["reward/mean_length"] == pytest.approx(6.0) and metrics["reward/failed"] == 2


def test_failures_above_the_rate_end_the_run(tmp_path):
    with scorer(None, settings(tmp_path, terms={"auto": 1})) as rewards:
        rewards._pools["auto"].last_failure = "prompt 'p': boom"
        rewards.check_failures(4, 8, step=3)
        message = "5 of 8 of step 3 failed, more than reward.max_failed = 0.5; .*prompt 'p': boom"
        with pytest.raises(InputError, match=message):
            rewards.check_failures(5, 8, step=3)


@pytest.mark.parametrize(
    "reply, score",
    [
        ("Score: 7/10", 0.7),
        ("<think>Score: 9</think>\n**score** = 2.5", 0.25),
        ("Score: 4. Wait. SCORE: 12", 1.0),
        ("score: -3", 0.0),
        ("<think>Score: 9</think> none", None),
        ("<think>Score: 9", None),
        ("score: high", None),
        ("", None),
    ],
)
def test_the_last_score_counts(tmp_path, reply, score):
    assert JudgeClient(settings(tmp_path).judge, str(tmp_path))._read(reply) == score


def test_a_judge_that_refuses_ends_the_run_at_the_start(served, tmp_path, monkeypatch, caplog):
    """The error does not show the key, although the server's answer does."""
    loop, _, url = served
    monkeypatch.setenv("JUDGE_KEY", "secret-key")
    monkeypatch.setitem(KINDS, "Reply with OK.", ["400"])
    caplog.set_level(logging.DEBUG)
    with scorer(loop, settings(tmp_path, url, key="JUDGE_KEY")) as rewards:
        with pytest.raises(
            InputError, match=r"judge.url: .* m at http.*: status 400: refused"
        ) as e:
            rewards.start()
    assert "Bearer ***" in str(e.value) and "secret-key" not in str(e.value) + caplog.text
    (tmp_path / "cache").write_text("not a data base" * 100)
    with pytest.raises(InputError, match="judge.cache: .*SQLite"):
        Scorer(settings(tmp_path, cache=str(tmp_path / "cache")), FakeTokenizer(), loop)


HEAD = """\
model: {path: none}
data: {prompts: "reasoning_gym:none"}
reward:
  terms: {good: 1}
judge:
  url: http://none
  model: m
  prompts: {good: "Rate {response}"}
"""


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("url: http://none", "url: none:8000", "6: judge.url: expected an address"),
        ("  url: http://none\n", "", "5: judge.url: expected a value"),
        ("good: 1", "goood: 1", "4: reward.terms: expected module:function or auto .*good, got"),
        ("good: 1", "good: much", '4: reward.terms.good: expected number, got "much"'),
        ("good: 1", "a:good: 1, good: 1", "4: reward.terms: expected functions with different"),
        ("  terms:", "  function: math_verify\n  terms:", "4: reward.function: expected no value"),
        ('{good: "', '{auto: x, good: "', "8: judge.prompts: expected names"),
        ('"Rate {response}"', "none.txt", "8: judge.prompts: expected a text with {response} or"),
        ("model: m", "model: m\n  key: sk-123", "8: judge.key: expected the name .*else"),
        ("model: m", "model: m\n  key: HIDDEN0", "8: judge.key: expected an environment variable"),
        ("model: m", "model: m\n  pattern: '[0-9]'", "8: judge.pattern: expected a regular"),
        ("model: m", "model: m\n  pattern: '('", "8: judge.pattern: expected a regular"),
        ("model: m", "model: m\n  min_score: 10", "8: judge.min_score: expected less"),
        ("model: m", "model: m\n  sampling: {n: 2}", "8: judge.sampling: expected no model"),
        ("model: m", "model: m\n  retry: 2", '8: judge.retry: unknown key; .*"judge.retries"'),
    ],
)
def test_bad_settings_give_one_error(tmp_path, monkeypatch, old, new, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(HEAD)
    checks.check_paths(load_config("run.yaml"))
    assert HEAD.count(old) == 1
    (tmp_path / "run.yaml").write_text(HEAD.replace(old, new))
    with pytest.raises(InputError, match=message) as error:
        checks.check_paths(load_config("run.yaml"))
    text = str(error.value)
    assert text.startswith("run.yaml:") and "\n" not in text
    assert "sk-123" not in text and "HIDDEN0" not in text


def test_a_template_may_be_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "x")
    (tmp_path / "good.txt").write_text("Rate {response}")
    file = os.path.relpath(tmp_path / "good.txt")
    config = settings(tmp_path, prompts={"good": file}, key="JUDGE_KEY")
    checks.check_paths(config)
    assert config.judge.template("good") == "Rate {response}"
