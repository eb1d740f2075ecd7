"""The adapter for ``verifiers``, in its virtual environment; chat sessions."""

import asyncio
import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron_espo.rollout import verifiers
from megatron_espo.rollout.chat import ChatSession, NoRoomError
from megatron_espo.rollout.environments import load_environment
from megatron_espo.rollout.verifiers import VERSION, VerifiersError
from megatron_espo.types import Prompt
from tests.distributed import ROOT
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

VARIABLE = "MEGATRON_ESPO_VERIFIERS_PYTHON"


@pytest.fixture(scope="module")
def python() -> str:
    """The interpreter that ``VARIABLE`` names, else one in a cache folder, made with pip."""
    if VARIABLE in os.environ:
        return os.environ[VARIABLE]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    found = cache / f"megatron_espo_verifiers_{VERSION}" / "bin" / "python"
    try:
        if not found.exists():
            subprocess.run(
                ["python3.11", "-m", "venv", found.parents[1]], check=True, capture_output=True
            )
        if subprocess.run([found, "-c", "import verifiers.v1"], capture_output=True).returncode:
            install = [found, "-m", "pip", "install", "-q", f"verifiers=={VERSION}"]
            subprocess.run(install, check=True, capture_output=True, timeout=600)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(
            f"verifiers {VERSION} cannot be installed ({error}); set {VARIABLE} to a Python with it"
        )
    return str(found)


def row(task: int) -> Prompt:
    return Prompt("row", "Q", "", tuple(encode("Q")), {"task": task})


def play(python: str, *rollouts, **changes):
    """All rollouts ``(task, source)`` at the same time."""

    async def run():
        environment = load_environment(
            "verifiers:guess-number-v1", {"python": python, "folder": str(ROOT / "tests")}
        )
        try:
            return await asyncio.gather(
                *(
                    environment.rollout(row(task), make_policy(source, **changes))
                    for task, source in rollouts
                ),
                return_exceptions=True,
            )
        finally:
            await environment.close()

    return asyncio.run(asyncio.wait_for(run(), 120))


def test_episodes_of_several_turns(python):
    sources = [FakeSource(["1", "9", "5"]), FakeSource(["7"]), FakeSource(["8", "3"])]
    found = play(python, (1, sources[0]), (2, sources[1]), (0, sources[2]))
    for trajectory, source in zip(found, sources, strict=True):
        check_lines_up(trajectory, source.sampled)
        assert (
            trajectory.reward == 1
            and trajectory.rewards["guessed"] == 1
            and trajectory.finish_reason == "stop"
        )
        assert trajectory.earlier == () and trajectory.rewards["splits"] == 0
    first = found[0]
    assert decode(first.prompt_ids) == "user:Guess a number up to 9 (not 50).assistant:"
    assert first.text == "1user:higherassistant:9user:lowerassistant:5" and len(first.turns) == 3


def test_a_trajectory_without_room_ends_without_reward(python):
    source = FakeSource(["1", "2", "5"])
    (found,) = play(python, (1, source), max_tokens=30)
    check_lines_up(found, source.sampled)
    assert found.reward == 0 and found.finish_reason == "length" and len(found.turns) == 2


def test_a_failed_episode_and_a_lost_process_are_errors(python, monkeypatch):
    (found,) = play(python, (99, FakeSource(["1"])))
    assert isinstance(found, VerifiersError) and "IndexError" in str(found)
    (found,) = play(python, (1, FakeSource([])))  # the source raises
    assert isinstance(found, VerifiersError) and "pop from empty list" in str(found)

    async def lose():
        environment = verifiers.VerifiersEnvironment(
            "guess-number-v1", python=python, folder=str(ROOT / "tests")
        )

        class Killer(FakeSource):
            async def generate(self, *arguments, **settings):
                environment._process.kill()
                return await super().generate(*arguments, **settings)

        with pytest.raises(VerifiersError, match="ended"):
            await environment.rollout(row(1), make_policy(Killer(["1"])))
        found = await environment.rollout(row(1), make_policy(FakeSource(["5"])))  # a new process
        await environment.close()
        return found

    assert asyncio.run(asyncio.wait_for(lose(), 120)).reward == 1


def test_prompts_of_a_taskset(python):
    command = [python, "-P", ROOT / "megatron_espo/rollout/verifiers_worker.py"]
    command += [json.dumps({"taskset": {"id": "guess-number-v1"}}), "--export", "2"]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, check=True)
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
        assert session.builder.splits == 0
        text = await session.reply(history[-1:])
        assert session.builder.splits == 1
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


def test_replies_of_one_session_wait_for_each_other():
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
