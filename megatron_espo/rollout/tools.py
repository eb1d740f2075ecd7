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
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from megatron_espo.errors import InputError
from megatron_espo.rewards import sandbox
from megatron_espo.rollout.engine import TOKEN_FIELDS, Generation
from megatron_espo.rollout.environments import Policy, TrajectoryBuilder
from megatron_espo.types import Prompt, Trajectory

MAX_EXPRESSION_CHARS = 200
MAX_DIGITS = 100

_NAMES = {"Add": "add", "Sub": "sub", "Mult": "mul", "Div": "truediv"}
_NAMES |= {"FloorDiv": "floordiv", "Mod": "mod", "Pow": "pow"}
OPERATORS = {getattr(ast, node): getattr(operator, name) for node, name in _NAMES.items()}


class ToolError(Exception):
    """The tool cannot answer a call. The model reads the message."""


def calculate(expression: str) -> float:
    """Compute ``+ - * / // % **`` over numbers, without executing code.

    Raises:
        ToolError: another expression, an undefined value, or more than ``MAX_DIGITS`` digits.
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


def _value(node: ast.AST) -> float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            found = value
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=operand):
            found = -_value(operand) if isinstance(op, ast.USub) else _value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            first, second = _value(left), _value(right)
            digits = abs(second) * math.log10(max(abs(first), 1))
            if isinstance(op, ast.Pow) and digits > MAX_DIGITS:
                raise OverflowError
            found = OPERATORS[type(op)](first, second)
        case _:
            raise ValueError
    if isinstance(found, complex) or not math.isfinite(found):
        raise ValueError
    if abs(found) >= 10**MAX_DIGITS:
        raise OverflowError
    return found


async def calculator(text: str) -> str:
    """Compute an arithmetic expression; see :func:`calculate`."""
    value = calculate(text)
    return str(value) if isinstance(value, int) else f"{value:.15g}"


class PythonTool:
    """Runs code in its own process and returns what the code prints.

    The process has the limits and, where the kernel grants it, the isolation of a reward worker.

    Args:
        timeout_s: of wall-clock time; then the process group is killed.
        memory_gib: most private memory of a process.
        file_mib: longest file that the code may write, printed text included.
        isolate: no network, and a read-only file system except a temporary folder.
        processes: most processes at the same time; further calls wait.
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
        limits = sandbox.limits(memory_gib, file_mib << 20, isolate)
        self._command = [sys.executable, "-E", "-s", sandbox.__file__, *limits]
        self._timeout_s, self._max_chars = timeout_s, max_chars
        self._free = asyncio.Semaphore(processes)

    async def __call__(self, text: str) -> str:
        async with self._free:
            # Files, not pipes, for what is printed: the limit of file sizes bounds them.
            with (
                tempfile.TemporaryDirectory(
                    prefix="megatron-espo-tool-", ignore_cleanup_errors=True
                ) as home,
                open(Path(home, "printed"), "w+b") as printed,
                open(Path(home, "errors"), "w+b") as errors,
            ):
                process = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=printed,
                    stderr=errors,
                    cwd=home,
                    env=sandbox.passed_environment((), home),
                    start_new_session=True,
                )
                try:
                    await asyncio.wait_for(process.communicate(text.encode()), self._timeout_s)
                except TimeoutError:
                    raise ToolError(f"no result in {self._timeout_s:g} s") from None
                finally:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    await process.wait()
                if process.returncode:
                    lines = _read(errors).splitlines()
                    raise ToolError(lines[-1] if lines else f"exit status {process.returncode}")
                return _read(printed)[: self._max_chars]


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace").strip()


# A tool answers the text of a call, or raises ToolError. It must not block the event loop.
Tool = Callable[[str], Awaitable[str]]
TOOLS: dict[str, Callable[..., Tool]] = {"calculator": lambda: calculator, "python": PythonTool}


class ToolEnvironment:
    """The model writes ``<tool>12*3</tool>`` and reads ``<result>36</result>``.

    The trajectory ends with the first turn without a call.

    A turn ends with its first complete call. Tokens that the engine sampled after the token that
    completes the call are dropped. The kept tokens are those of an engine that stops there, so
    their log-probs stay right. If the closing tag is one token, the engine does stop there.

    Args:
        tool: ``calculator`` or ``python``.
        max_turns: most sampled turns; a call in the last turn ends the trajectory with ``length``.
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
        tool_args: dict[str, Any] | None = None,
    ) -> None:
        if tool not in TOOLS:
            raise TypeError(f"tool: expected {' or '.join(TOOLS)}, got {tool!r}")
        if max_turns < 1 or (max_turn_tokens is not None and max_turn_tokens < 1):
            raise TypeError("max_turns and max_turn_tokens: expected at least 1")
        self._tags = before, self._end = call_tags
        self._call = re.compile(f"{re.escape(before)}(.*?){re.escape(self._end)}", re.DOTALL)
        self._tool, self._result = TOOLS[tool](**tool_args or {}), result
        self._max_turns, self._max_turn_tokens = max_turns, max_turn_tokens

    async def rollout(self, prompt: Prompt, policy: Policy) -> Trajectory:
        builder, closing = TrajectoryBuilder(prompt), policy.encode(self._end)
        for tag in self._tags:
            if tag not in policy.decode(policy.encode(tag)):
                expected = "expected call_tags without special tokens"
                raise InputError(f"environment.args: {expected}, got {tag!r}")
        stops = (*policy.sampling.stop_token_ids, *(closing if len(closing) == 1 else ()))
        counts, reason = {"tool_calls": 0.0, "tool_errors": 0.0}, "length"
        for turn in range(self._max_turns):
            if (room := builder.room(policy)) < 1:
                break
            limit, context = min(room, self._max_turn_tokens or room), builder.context
            found = await policy.generate(context, max_tokens=limit, stop_token_ids=stops)
            kept, call = self._first_call(found, policy)
            builder.add_turn(kept)
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
        """Return the turn up to its first complete call, and the text of the call."""
        ids = found.token_ids.tolist()

        def search(length: int) -> re.Match[str] | None:
            return self._call.search(policy.decode(ids[:length]))

        if not search(len(ids)):
            return found, None
        length = bisect_left(range(len(ids)), True, key=lambda count: bool(search(count)))
        match, experts, mask = search(length), found.routed_experts, found.sampling_mask
        assert match is not None
        kept: dict[str, Any] = {name: getattr(found, name)[:length] for name in TOKEN_FIELDS}
        experts = None if experts is None else experts[: length - len(ids) or None]
        mask = None if mask is None else mask[:length]
        return replace(found, **kept, routed_experts=experts, sampling_mask=mask), match[1]
