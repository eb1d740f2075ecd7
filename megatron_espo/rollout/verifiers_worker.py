"""Runs a ``verifiers`` 0.4 environment for ``verifiers.py``, in its own virtual environment.

Started as a script. It imports ``verifiers`` and the standard library, never this package.

The protocol is one JSON object a line. Standard input: ``{"rollout", "task"}`` starts an episode on
the task of that index; ``{"cancel"}`` ends it; ``{"call", "text", "finish_reason"}`` or
``{"call", "error"}`` answers a request for a turn. Standard output: ``{"ready"}``; ``{"rollout",
"call", "messages", "max_tokens", "trainable"}`` requests a turn; ``{"rollout", "reward", "rewards",
"errors"}`` ends an episode.

    python verifiers_worker.py '{"taskset": {"id": "my-taskset"}}' --export 100 > prompts.jsonl
"""

import asyncio
import itertools
import json
import os
import sys
from typing import IO, Any

import httpx
import verifiers.v1 as vf
from verifiers.v1.clients import Client, EvalClientConfig, ModelContext
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.errors import ProviderError
from verifiers.v1.interception import server
from verifiers.v1.runtimes import ProgramResult
from verifiers.v1.utils.loaders import env_config_type, load_environment

POLICY = "http://megatron-espo"  # not a host: marks the client that asks the trainer
HARNESS = "megatron_espo_chat"

__all__ = ["ChatHarness"]


class ChatHarness(vf.Harness[vf.HarnessConfig]):
    """Makes one model call for each turn of the environment, in this process. Without tools."""

    APPENDS_SYSTEM_PROMPT, SUPPORTS_RESUME = True, True
    EXECUTES_CODE, NEEDS_CONTAINER = False, False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data) -> ProgramResult:
        if mcp_urls:
            raise NotImplementedError("tools need another harness: set agent.harness.id")
        messages = first_messages(data)
        async with httpx.AsyncClient(timeout=None) as client:
            found = await client.post(
                f"{endpoint.rstrip('/')}/chat/completions",
                json={"model": ctx.model, "messages": messages},
                headers={"Authorization": f"Bearer {secret}"},
            )
        return ProgramResult(0 if found.is_success else 1, "", found.text)


def first_messages(data: vf.TaskData) -> list[dict[str, Any]]:
    """Return the first messages of a task."""
    system = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
    if isinstance(data.prompt, str):
        return [*system, {"role": "user", "content": data.prompt}]
    return system + [message_to_wire(message) for message in data.prompt or []]


class Worker(Client):
    """The environment, and the client through which it asks the trainer's policy."""

    def __init__(self, env: vf.Env, output: IO[str]) -> None:
        self.env, self._output, self._tasks = env, output, iter(env.taskset)
        self._known: list[vf.Task] = []
        self._rollouts: dict[int, asyncio.Task] = {}
        self._traces: dict[str, tuple[int, vf.Trace]] = {}  # with the number of the rollout
        self._calls: dict[int, asyncio.Future] = {}
        self._numbers = itertools.count()

    def send(self, **message: Any) -> None:
        self._output.write(json.dumps(message) + "\n")
        self._output.flush()

    async def get_response(self, dialect, body, sampling, session_id=None, turn=None, headers=None):
        if body.get("tools"):
            raise ProviderError("the policy takes no tool schemas", status_code=400)
        call, (number, trace) = next(self._numbers), self._traces[session_id]
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        reply = self._calls[call] = asyncio.get_running_loop().create_future()
        request = {"messages": body["messages"], "max_tokens": limit}
        self.send(rollout=number, call=call, trainable=trace.agent.trainable, **request)
        try:
            answer = await reply
        finally:
            del self._calls[call]
        if "error" in answer:
            raise ProviderError(answer["error"], status_code=400)
        message = {"role": "assistant", "content": answer["text"]}
        choice = {"index": 0, "message": message, "finish_reason": answer["finish_reason"]}
        raw = {"id": str(call), "object": "chat.completion", "created": 0}
        raw |= {"model": body["model"], "choices": [choice]}
        response = dialect.parse_response(dialect.validate_response(raw))
        response.raw = raw
        return response

    def task(self, index: int) -> vf.Task:
        self._known += itertools.islice(self._tasks, max(0, index + 1 - len(self._known)))
        return self._known[index]

    async def rollout(self, number: int, index: int) -> None:
        traces = []

        def register(trace: vf.Trace) -> None:
            self._traces[trace.id] = number, trace
            traces.append(trace.id)

        context = ModelContext(model="policy", client=EvalClientConfig(base_url=POLICY))
        result: dict[str, Any] = {"reward": None, "rewards": {}, "errors": []}
        try:
            episode = await self.env.run_episode(self.task(index), context, on_trace=register)
            errors = itertools.chain(episode.errors, *(trace.errors for trace in episode.traces))
            result["errors"] = [f"{error.type}: {error.message}" for error in errors]
            trained = [trace for trace in episode.traces if trace.agent.trainable]
            if episode.ok and trained:
                result["reward"] = sum(trace.reward for trace in trained) / len(trained)
                for trace in trained:
                    parts = {name: reward.value for name, reward in trace.rewards.items() if reward}
                    result["rewards"] |= parts | trace.metrics
        except Exception as error:
            result["errors"] = [f"{type(error).__name__}: {error}"]
        finally:
            for trace in traces:
                self._traces.pop(trace, None)
            self._rollouts.pop(number, None)
        self.send(rollout=number, **result)

    async def serve(self) -> None:
        """Answer standard input until it ends."""
        reader = asyncio.StreamReader(limit=1 << 26)
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        async with self.env.serving():
            self.send(ready=True)
            while line := await reader.readline():
                message = json.loads(line)
                if "task" in message:
                    number = message["rollout"]
                    self._rollouts[number] = loop.create_task(self.rollout(number, message["task"]))
                elif "cancel" in message:
                    if message["cancel"] in self._rollouts:
                        self._rollouts[message["cancel"]].cancel()
                elif message["call"] in self._calls and not self._calls[message["call"]].done():
                    self._calls[message["call"]].set_result(message)


def make_env(config: dict[str, Any]) -> vf.Env:
    """Build the environment. Agents run with our harness in local processes by default."""
    config_type = env_config_type(config["taskset"]["id"], config.get("id", ""))
    local = {"harness": {"id": HARNESS}, "runtime": {"type": "subprocess"}}
    for name, field in config_type.model_fields.items():
        if isinstance(field.default, vf.AgentConfig):
            config[name] = local | config.get(name, {})
    return load_environment(config_type.model_validate(config))


def main() -> None:
    # Standard output is for the protocol. What libraries print goes to standard error.
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.modules[HARNESS] = sys.modules["__main__"]  # verifiers finds a harness by its module
    sys.path.append(os.getcwd())
    env = make_env(json.loads(sys.argv[1]))
    if sys.argv[2:3] == ["--export"]:
        for index, task in enumerate(itertools.islice(env.taskset, int(sys.argv[3]))):
            row = {"prompt": first_messages(task.data), "answer": "", "task": index}
            output.write(json.dumps(row) + "\n")
        output.flush()
        return
    worker = Worker(env, output)
    resolve = server.resolve_client
    server.resolve_client = lambda config: worker if config.base_url == POLICY else resolve(config)
    asyncio.run(worker.serve())
    os._exit(0)


if __name__ == "__main__":
    main()
