"""An environment in which the model calls a tool: a calculator or a Python interpreter."""

import ast
import asyncio
import math
import operator
import os
import re
import signal
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from megatron_espo.rewards import run_python
from megatron_espo.rewards.pool import ENVIRONMENT
from megatron_espo.rollout.engine import Generation
from megatron_espo.rollout.environments import Policy, TrajectoryBuilder
from megatron_espo.types import Prompt, Trajectory

MAX_EXPRESSION_CHARS = 200
MAX_DIGITS = 100

Number = int | float
OPERATORS: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


class ToolError(Exception):
    """A call that the tool cannot answer. The model reads the message."""


class Tool(Protocol):
    """Answers the text of a call. Must not block the event loop."""

    async def __call__(self, text: str) -> str:
        """The result. ToolError: the call is wrong."""


def calculate(expression: str) -> Number:
    """The value of ``+ - * / // % **`` over numbers. Nothing is executed.

    Raises:
        ToolError: not such an expression, undefined, or a number of more than ``MAX_DIGITS``
            digits.
    """
    if len(expression) > MAX_EXPRESSION_CHARS:
        raise ToolError(f"more than {MAX_EXPRESSION_CHARS} characters")
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except ZeroDivisionError:
        raise ToolError("division by zero") from None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise ToolError("not an arithmetic expression") from None
    except OverflowError:
        raise ToolError("the number is too large") from None


def _value(node: ast.AST) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            found = value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            found = -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            found = _value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            first, second = _value(left), _value(right)
            if isinstance(op, ast.Pow) and abs(second) * math.log10(abs(first) + 1) > MAX_DIGITS:
                raise OverflowError
            found = OPERATORS[type(op)](first, second)
        case _:
            raise ValueError
    if isinstance(found, complex) or not math.isfinite(found):
        raise ValueError
    if abs(found) >= 10**MAX_DIGITS:
        raise OverflowError
    return found


class Calculator:
    """Evaluates an arithmetic expression; see :func:`calculate`."""

    async def __call__(self, text: str) -> str:
        value = calculate(text)
        return str(value) if isinstance(value, int) else f"{value:.10g}"


class PythonTool:
    """Runs code in a process of its own and returns what it prints.

    The process has the limits and, where the kernel grants it, the isolation of a reward worker.

    Args:
        timeout_s: of wall-clock time; then the process group is killed.
        memory_gib: most private memory of a process.
        file_mib: longest file that it may write, printed text included.
        isolate: no network, a read-only file system but for a temporary folder.
        processes: most that run at the same time; further calls wait.
        max_chars: longer results are cut.
    """

    def __init__(
        self,
        *,
        timeout_s: float = 5.0,
        memory_gib: float = 1.0,
        file_mib: int = 1,
        isolate: bool = True,
        processes: int = 4,
        max_chars: int = 500,
    ) -> None:
        limits = (int(memory_gib * 2**30), file_mib << 20, int(isolate))
        # Not isolated mode (-I): the script imports its neighbour.
        self._command = [sys.executable, "-E", "-s", run_python.__file__, *map(str, limits)]
        self._timeout_s, self._max_chars = timeout_s, max_chars
        self._free = asyncio.Semaphore(processes)

    async def __call__(self, text: str) -> str:
        async with self._free:
            with tempfile.TemporaryDirectory(
                prefix="megatron-espo-tool-", ignore_cleanup_errors=True
            ) as home:
                return await self._run(text, home)

    async def _run(self, code: str, home: str) -> str:
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        environment |= {"HOME": home, "TMPDIR": home, "OMP_NUM_THREADS": "1"}
        # Files, not pipes: the limit of file sizes then bounds what is printed.
        with (
            open(Path(home, "printed"), "w+b") as printed,
            open(Path(home, "errors"), "w+b") as errors,
        ):
            process = await asyncio.create_subprocess_exec(
                *self._command,
                str(os.getpid()),
                stdin=asyncio.subprocess.PIPE,
                stdout=printed,
                stderr=errors,
                cwd=home,
                env=environment,
                start_new_session=True,
            )
            try:
                await asyncio.wait_for(process.communicate(code.encode()), self._timeout_s)
            except TimeoutError:
                raise ToolError(f"no result in {self._timeout_s:g} s") from None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
            if process.returncode:
                lines = self._read(errors).splitlines()
                raise ToolError(lines[-1] if lines else f"exit status {process.returncode}")
            return self._read(printed)[: self._max_chars]

    def _read(self, file) -> str:
        file.seek(0)
        return file.read().decode(errors="replace").strip()


TOOLS: dict[str, Callable[..., Tool]] = {"calculator": Calculator, "python": PythonTool}


class ToolEnvironment:
    """The model writes ``<tool>12*3</tool>`` and reads ``<result>36</result>``.

    The trajectory ends with the first turn that has no call.

    A turn ends with its first complete call. Tokens that the engine sampled after the token that
    completes the call are dropped. The kept tokens are exactly those of an engine that stops there,
    so their log-probs stay right. Where the closing tag is one token of the vocabulary, the engine
    does stop there.

    Args:
        tool: ``calculator`` or ``python``.
        max_turns: most sampled turns; a call in the last one ends the trajectory with ``length``.
        max_turn_tokens: most tokens of a turn; ``None``: what the limits of the trajectory leave.
        call_tags: text before and after a call.
        result: the observation; ``{}`` stands for the result, or for ``error: `` and the tool's
            message. It begins with a line break, because many tokenizers have a token ``><``, which
            would end the call with a part of the result.
        tool_args: keyword arguments of the tool; see :class:`PythonTool`.

    Raises:
        TypeError: another tool, wrong arguments, or a limit below 1.
    """

    def __init__(
        self,
        tool: str = "calculator",
        *,
        max_turns: int = 4,
        max_turn_tokens: int | None = None,
        call_tags: tuple[str, str] = ("<tool>", "</tool>"),
        result: str = "\n<result>{}</result>\n",
        tool_args: dict | None = None,
    ) -> None:
        if tool not in TOOLS:
            raise TypeError(f"tool: expected {' or '.join(TOOLS)}, got {tool!r}")
        if max_turns < 1 or (max_turn_tokens is not None and max_turn_tokens < 1):
            raise TypeError("max_turns and max_turn_tokens: expected at least 1")
        before, self._end = call_tags
        self._call = re.compile(f"{re.escape(before)}(.*?){re.escape(self._end)}", re.DOTALL)
        self._tool, self._result = TOOLS[tool](**tool_args or {}), result
        self._max_turns, self._max_turn_tokens = max_turns, max_turn_tokens

    async def rollout(self, prompt: Prompt, policy: Policy) -> Trajectory:
        builder = TrajectoryBuilder(prompt)
        closing = policy.encode(self._end)
        stop_ids = (*policy.sampling.stop_token_ids, *(closing if len(closing) == 1 else ()))
        counts, reason = {"tool_calls": 0.0, "tool_errors": 0.0}, "length"
        for turn in range(self._max_turns):
            room = builder.room(policy)
            if room < 1:
                break
            limit = min(room, self._max_turn_tokens or room)
            found = await policy.generate(
                builder.context, max_tokens=limit, stop_token_ids=stop_ids
            )
            found, call = self._first_call(found, policy)
            builder.add_turn(found)
            if call is None:
                reason = found.finish_reason
                break
            counts["tool_calls"] += 1
            if turn + 1 == self._max_turns:
                break
            try:
                answer = await self._tool(call)
            except ToolError as error:
                counts["tool_errors"] += 1
                answer = f"error: {error}"
            builder.add_observation(policy.encode(self._result.replace("{}", answer)))
        return builder.build(policy.decode(builder.response_ids), reason, rewards=counts)

    def _first_call(self, found: Generation, policy: Policy) -> tuple[Generation, str | None]:
        """The turn up to its first complete call, and the text of the call."""
        ids = found.token_ids.tolist()

        def has_call(length: int) -> bool:
            return self._call.search(policy.decode(ids[:length])) is not None

        if not has_call(len(ids)):
            return found, None
        length = bisect_left(range(len(ids)), True, key=has_call)
        call = self._call.search(policy.decode(ids[:length]))[1]
        dropped, experts = len(ids) - length, found.routed_experts
        return replace(
            found,
            token_ids=found.token_ids[:length],
            logprobs=found.logprobs[:length],
            versions=found.versions[:length],
            routed_experts=None if experts is None else experts[: len(experts) - dropped],
        ), call
