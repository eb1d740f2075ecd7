"""Environments of the ``verifiers`` library, in a process and a virtual environment of its own."""

import asyncio
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_espo.rewards.pool import ENVIRONMENT
from megatron_espo.rollout.chat import ChatSession, NoRoomError
from megatron_espo.rollout.environments import Policy
from megatron_espo.types import Prompt, Trajectory

VERSION = "0.4.0"
START_TIMEOUT_S = 180.0
_MAX_LINE = 1 << 26


class VerifiersError(RuntimeError):
    """The process of the environment ended, or an episode failed."""


class VerifiersEnvironment:
    """Plays episodes of a ``verifiers`` environment with the policy; see ``verifiers_worker``.

    A row of the prompts names its task: ``{"prompt", "answer", "task": index in the taskset}``. All
    model calls of an episode form one trajectory, and its reward is the mean of the trained traces.

    Args:
        environment_id: of the taskset.
        python: interpreter of the virtual environment with ``verifiers`` ``VERSION``.
        config: further settings of the environment, such as ``{"agent": {"max_turns": 4}}``.
        folder: working directory of the process; modules in it are found.
        variables: names of environment variables that the process sees besides those of reward
            workers.
    """

    def __init__(
        self,
        environment_id: str,
        *,
        python: str,
        config: dict[str, Any] | None = None,
        folder: str = ".",
        variables: Sequence[str] = (),
    ) -> None:
        config = dict(config or {})
        config["taskset"] = {"id": environment_id} | config.get("taskset", {})
        script = Path(__file__).with_name("verifiers_worker.py")
        # -P: the folder of the script holds modules with common names.
        self._command = [python, "-P", str(script), json.dumps(config)]
        self._folder = folder
        names = (*ENVIRONMENT, "HOME", *variables)
        self._variables = {name: os.environ[name] for name in names if name in os.environ}
        self._numbers = itertools.count()
        self._rollouts: dict[int, asyncio.Queue[dict[str, Any]]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task | None = None
        self._starting = asyncio.Lock()

    async def rollout(self, prompt: Prompt, policy: Policy) -> Trajectory:
        async with self._starting:
            if self._process is None:
                await self._start()
        number, session = next(self._numbers), ChatSession(prompt, policy)
        messages = self._rollouts[number] = asyncio.Queue()
        calls: set[asyncio.Task] = set()
        full, ended = False, False

        async def answer(message: dict[str, Any]) -> None:
            nonlocal full
            try:
                text = await session.reply(message["messages"], message["max_tokens"])
                self._send(
                    call=message["call"], text=text, finish_reason=session.last.finish_reason
                )
            except Exception as error:
                full = full or isinstance(error, NoRoomError)
                self._send(call=message["call"], error=f"{type(error).__name__}: {error}")

        try:
            self._send(rollout=number, task=prompt.metadata["task"])
            while "errors" not in (message := await messages.get()):
                calls.add(asyncio.create_task(answer(message)))
            ended = True
        finally:
            for call in calls:
                call.cancel()
            del self._rollouts[number]
            if not ended:
                self._send(cancel=number)
        reward, reason = message["reward"], session.last.finish_reason if session.last else "length"
        if full:
            reward, reason = reward or 0.0, "length"
        if reward is None:
            raise VerifiersError(
                f"the episode failed: {'; '.join(message['errors']) or 'no reward'}"
            )
        rewards = {
            name: float(value) for name, value in message["rewards"].items() if value is not None
        }
        rewards["splits"] = float(session.builder.splits)
        text = policy.decode(session.builder.response_ids)
        return session.builder.build(text, reason, reward=reward, rewards=rewards)

    async def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            await self._reader

    async def _start(self) -> None:
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=self._folder,
            env=self._variables,
            limit=_MAX_LINE,
        )
        try:
            line = await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT_S)
        except BaseException:
            process.kill()
            raise
        if not line:
            code = await process.wait()
            raise VerifiersError(
                f"the process of the environment ended with {code}; see standard error"
            )
        self._process = process
        self._reader = asyncio.create_task(self._read(process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Hand messages to their rollouts. When the process ends, all rollouts under way fail."""
        try:
            while line := await process.stdout.readline():
                message = json.loads(line)
                if message["rollout"] in self._rollouts:
                    self._rollouts[message["rollout"]].put_nowait(message)
        finally:
            self._process = None
            lost = {
                "reward": None,
                "rewards": {},
                "errors": ["the process of the environment ended"],
            }
            for messages in self._rollouts.values():
                messages.put_nowait(lost)
            await process.wait()

    def _send(self, **message: Any) -> None:
        if self._process is not None and not self._process.stdin.is_closing():
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
