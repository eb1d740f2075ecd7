"""Environments of the ``verifiers`` library, in their own process and virtual environment."""

import asyncio
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_espo.errors import InputError
from megatron_espo.rewards.sandbox import passed_environment
from megatron_espo.rollout.environments import ChatSession, NoRoomError, Policy
from megatron_espo.types import Prompt, Trajectory

START_TIMEOUT_S = 180.0
_MAX_LINE = 1 << 26


class VerifiersError(RuntimeError):
    """The process of the environment ended, or an episode failed."""


class VerifiersEnvironment:
    """Runs episodes of a ``verifiers`` environment with the policy; see ``verifiers_worker``.

    A row of the prompts names its task: ``{"prompt", "answer", "task": index in the taskset}``. All
    model calls of trainable agents form one trajectory. Its reward is the mean of their traces.

    Args:
        environment_id: of the taskset.
        python: interpreter of the virtual environment with ``verifiers`` 0.4.
        config: further settings of the environment, such as ``{"agent": {"max_turns": 4}}``.
        folder: working directory of the process, from which it can import modules.
        variables: names of environment variables for the process, besides those of reward workers.
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
        self._folder, self._variables = folder, passed_environment(("HOME", *variables))
        self._numbers = itertools.count()
        self._rollouts: dict[int, asyncio.Queue[dict[str, Any]]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task | None = None
        self._starting = asyncio.Lock()
        self._refused: InputError | None = None

    async def rollout(self, prompt: Prompt, policy: Policy) -> Trajectory:
        async with self._starting:
            if self._refused:
                raise self._refused
            if self._process is None:
                try:
                    await self._start()
                except (VerifiersError, OSError) as error:
                    if self._reader:  # it has started before
                        raise
                    expected = f"expected an environment that starts in {START_TIMEOUT_S:g} s"
                    self._refused = InputError(f"environment.name: {expected}, got: {error!r}")
                    raise self._refused from None
        number, session = next(self._numbers), ChatSession(prompt, policy)
        received = self._rollouts[number] = asyncio.Queue()
        full = False

        async def answer(request: dict[str, Any]) -> None:
            nonlocal full
            try:
                messages, limit = request["messages"], request["max_tokens"]
                if request["trainable"]:
                    text, found = await session.reply(messages, limit), session.last
                else:
                    found = await policy.generate(policy.render(messages), max_tokens=limit)
                    text = policy.decode(found.token_ids.tolist())
                assert found
                reply = {"text": text, "finish_reason": found.finish_reason}
            except Exception as error:
                full = full or isinstance(error, NoRoomError)
                reply = {"error": f"{type(error).__name__}: {error}"}
            self._send(call=request["call"], **reply)

        calls: list[asyncio.Task] = []
        try:
            self._send(rollout=number, task=prompt.metadata["task"])
            while "errors" not in (result := await received.get()):
                calls.append(asyncio.create_task(answer(result)))
        finally:
            for task in calls:
                task.cancel()
            del self._rollouts[number]
            self._send(cancel=number)  # without effect on an episode that has ended
        reward, reason = result["reward"], session.last.finish_reason if session.last else "length"
        if full:
            reward, reason = reward or 0.0, "length"
        if reward is None:
            errors = "; ".join(result["errors"]) or "no reward"
            raise VerifiersError(f"the episode failed: {errors}")
        rewards = {name: float(v) for name, v in result["rewards"].items() if v is not None}
        text = policy.decode(session.builder.response_ids)
        return session.builder.build(text, reason, reward=reward, rewards=rewards)

    async def close(self) -> None:
        """Kill the process."""
        if self._process and self._reader:
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
        assert process.stdout is not None
        try:
            line = await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT_S)
        except BaseException:
            process.kill()
            raise
        if not line:
            ended = f"the process of the environment ended with {await process.wait()}"
            raise VerifiersError(f"{ended}; see standard error")
        self._process = process
        self._reader = asyncio.create_task(self._read(process, process.stdout))

    async def _read(
        self, process: asyncio.subprocess.Process, output: asyncio.StreamReader
    ) -> None:
        """Pass messages to their rollouts. When the process ends, all rollouts in flight fail."""
        try:
            while line := await output.readline():
                message = json.loads(line)
                if message["rollout"] in self._rollouts:
                    self._rollouts[message["rollout"]].put_nowait(message)
        finally:
            self._process = None
            lost = {"reward": None, "errors": ["the process of the environment ended"]}
            for messages in self._rollouts.values():
                messages.put_nowait(lost)
            await process.wait()

    def _send(self, **message: Any) -> None:
        stdin = self._process and self._process.stdin
        if stdin and not stdin.is_closing():
            stdin.write(json.dumps(message).encode() + b"\n")
