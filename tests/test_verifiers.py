"""The adapter for ``verifiers`` in its virtual environment; chat sessions."""

import asyncio
import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron_espo.errors import InputError
from megatron_espo.rollout.environments import ChatSession, NoRoomError
from megatron_espo.rollout.runner import load_environment
from megatron_espo.rollout.verifiers import VerifiersError
from megatron_espo.types import Prompt
from tests.support.distributed import ROOT
from tests.test_environments import (
    EOS,
    FakeSource,
    check_lines_up,
    decode,
    encode,
    make_policy,
    make_prompt,
    render,
)

VERSION = "0.4.0"
FOLDER = ROOT / "tests" / "support"
VARIABLE = "MEGATRON_ESPO_VERIFIERS_PYTHON"


@pytest.fixture(scope="module")
def python() -> str:
    """The interpreter that ``VARIABLE`` names, else one in a cache folder, made with pip."""
    if VARIABLE in os.environ:
        return os.environ[VARIABLE]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / f"megatron_espo_verifiers_{VERSION}"
    found = folder / "bin" / "python"
    check = f"from importlib.metadata import version; assert version('verifiers') == '{VERSION}'"
    try:
        if not found.exists():
            command = ["python3.11", "-m", "venv", folder]
            subprocess.run(command, check=True, capture_output=True)
        if subprocess.run([found, "-c", check], capture_output=True).returncode:
            install = [found, "-m", "pip", "install", "-q", f"verifiers=={VERSION}"]
            subprocess.run(install, check=True, capture_output=True, timeout=900)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"verifiers {VERSION}: {error}; set {VARIABLE} to a Python that has it")
    return str(found)


def row(task: int) -> Prompt:
    return Prompt("row", "Q", "", tuple(encode("Q")), {"task": task})


def make_environment(python: str, **arguments):
    arguments |= {"python": python, "folder": str(FOLDER)}
    return load_environment("verifiers:guess-number-v1", arguments)


def test_episodes(python):
    """Episodes of several turns, one without room for its last turn, and two that fail."""
    turns = [["1", "9", "5"], ["7"], ["8", "3"], ["1", "2", "5"], ["1"], []]
    sources = [FakeSource(texts) for texts in turns]
    limits = [{}, {}, {}, {"max_tokens": 30}, {}, {}]

    async def play():
        environment = make_environment(python)
        rollouts = [
            environment.rollout(row(task), make_policy(source, **limit))
            for task, source, limit in zip((1, 2, 0, 1, 99, 1), sources, limits, strict=True)
        ]
        try:
            return await asyncio.gather(*rollouts, return_exceptions=True)
        finally:
            await environment.close()

    *found, short, missing, raising = asyncio.run(asyncio.wait_for(play(), 120))
    for trajectory, source in zip([*found, short], sources[:4], strict=True):
        check_lines_up(trajectory, source.sampled)
    for trajectory in found:
        assert trajectory.reward == 1 and trajectory.finish_reason == "stop"
        assert trajectory.rewards["guessed"] == 1 and not trajectory.earlier
        assert trajectory.earlier == ()
    first = found[0]
    assert decode(first.prompt_ids) == "user:Guess a number up to 9 (not 50).assistant:"
    assert first.text == "1user:higherassistant:9user:lowerassistant:5" and len(first.turns) == 3
    assert (short.reward, short.finish_reason, len(short.turns)) == (0, "length", 2)
    assert isinstance(missing, VerifiersError) and "IndexError" in str(missing)
    assert isinstance(raising, VerifiersError) and "pop from empty list" in str(raising)


def test_agents_that_are_not_trainable_are_not_trained(python):
    """Their turns come from the policy, but belong to no part of the trajectory."""
    source = FakeSource(["HINT", "5"])

    async def play():
        environment = make_environment(python, config={"helped": True})
        try:
            return await environment.rollout(row(1), make_policy(source))
        finally:
            await environment.close()

    found = asyncio.run(asyncio.wait_for(play(), 120))
    (only,) = found.parts
    assert decode(only.response_ids) == "5" and found.reward == 1 and found.finish_reason == "stop"
    assert decode(source.requests[1][1]) == decode(only.prompt_ids)


def test_an_environment_that_never_starts_ends_the_run(tmp_path):
    """All rollouts fail after one start."""
    starts = tmp_path / "starts"
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\necho >> {starts}\nexit 1\n")
    script.chmod(0o755)

    async def play(python):
        environment = make_environment(str(python))
        rollouts = [environment.rollout(row(1), make_policy(FakeSource([]))) for _ in range(5)]
        return await asyncio.gather(*rollouts, return_exceptions=True)

    for python in (script, tmp_path / "none"):
        errors = asyncio.run(play(python))
        assert [type(error) for error in errors] == [InputError] * 5
    assert len(starts.read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_lost_process_is_an_error_and_is_replaced(python):
    async def lose():
        environment = make_environment(python)

        class Killer(FakeSource):
            async def generate(self, *arguments, **settings):
                environment._process.kill()
                return await super().generate(*arguments, **settings)

        with pytest.raises(VerifiersError, match="ended"):
            await environment.rollout(row(1), make_policy(Killer(["1"])))
        found = await environment.rollout(row(1), make_policy(FakeSource(["5"])))
        await environment.close()
        return found

    assert asyncio.run(asyncio.wait_for(lose(), 120)).reward == 1


def test_prompts_of_a_taskset(python):
    command = [python, "-P", ROOT / "megatron_espo/rollout/verifiers_worker.py"]
    command += [json.dumps({"taskset": {"id": "guess-number-v1"}}), "--export", "2"]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["task"] for row in rows] == [0, 1]
    assert rows[0]["prompt"] == [{"role": "user", "content": "Guess a number up to 9 (not 30)."}]


def test_a_chat_session_splits_where_the_history_differs():
    source = FakeSource(["one", "two", "three"])

    async def talk():
        session = ChatSession(make_prompt(), make_policy(source, max_tokens=60))
        history = [{"role": "user", "content": "a"}]
        for said in ("b", "c"):
            text = await session.reply(history)
            history += [{"role": "assistant", "content": text}, {"role": "user", "content": said}]
        assert not session.builder.build("").earlier
        text = await session.reply(history[-1:])
        assert len(session.builder.build("").earlier) == 1
        with pytest.raises(NoRoomError):
            history = [
                history[-1],
                {"role": "assistant", "content": text},
                {"role": "user", "content": "x" * 60},
            ]
            await session.reply(history)
        return session.builder.build("")

    found = asyncio.run(talk())
    check_lines_up(found, source.sampled)
    assert [len(part.turns) for part in found.parts] == [2, 1]
    assert found.parts[1].prompt_ids.tolist() == render([{"role": "user", "content": "c"}])
    assert source.sampled[0][-1] == EOS


def test_a_chat_session_answers_one_call_at_a_time():
    source = FakeSource(["one", "two", "three"], abort_after=2)

    async def talk():
        session = ChatSession(make_prompt(), make_policy(source))
        asked = [[{"role": "user", "content": said}] for said in "abc"]
        await asyncio.gather(*(session.reply(messages) for messages in asked))
        return session.builder.build("")

    found = asyncio.run(talk())
    check_lines_up(found, source.sampled)
    assert [decode(part.prompt_ids) for part in found.parts] == [
        f"user:{said}assistant:" for said in "abc"
    ]
