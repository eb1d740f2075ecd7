"""Reward functions. They judge one response each and know nothing of processes or time limits (see ``pool``)."""

import difflib
import functools
import importlib
import inspect
import json
import logging
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any, Protocol

from megatron_espo.data.reasoning_gym_task import create_task
from megatron_espo.errors import InputError
from megatron_espo.types import Prompt

ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
# A minus directly after a word, digit or closing bracket is a subtraction, not a sign.
NUMBER = re.compile(r"(?:(?<![\w.)\]])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+")


class RewardFunction(Protocol):
    """Judges one response. Called in a worker process, one call at a time."""

    def __call__(self, prompt: Prompt, response: str) -> float:
        """The reward, a finite real number; anything else, or an exception, makes the response count as unjudged."""


def load_reward_function(name: str) -> RewardFunction:
    """The function called ``name``, with everything it imports loaded.

    Args:
        name: ``auto`` (reasoning_gym for reasoning-gym prompts, math_verify for others), ``reasoning_gym``,
            ``math_verify``, or ``module:function``, looked up on ``sys.path``.

    Raises:
        InputError: no such module or function, or it cannot be called with a prompt and a response. What the import itself raises passes through.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]()
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        known = ", ".join(BUILT_IN)
        raise InputError(f"reward.function: expected {known} or module:function, got {name!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name:
            raise
        raise InputError(f"reward.function: expected a module {module_name} on Python's path or in the current directory, found none") from None
    if not hasattr(module, attribute):
        close = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"reward.function: {module.__file__} has no {attribute!r}{hint}")
    function = getattr(module, attribute)
    if not callable(function):
        raise InputError(f"reward.function: {name} is not callable but a {type(function).__name__}")
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        raise InputError(f"reward.function: expected {name} to take (prompt, response), got {inspect.signature(function)}: {error}") from None
    except ValueError:
        pass  # written in C, without a signature
    return function


def extract_answer(response: str, gold: str) -> str:
    """The part of ``response`` that is judged.

    The first of these that is there: the last ``<answer>...</answer>``; the last ``\\boxed{...}``; where ``gold`` is a
    number, the last number; the whole response. Blanks at both ends are dropped.
    """
    if tags := ANSWER_TAG.findall(response):
        return tags[-1].strip()
    if (boxed := _last_boxed(response)) is not None:
        return boxed.strip()
    if _is_number(gold) and (numbers := NUMBER.findall(response.replace("\N{MINUS SIGN}", "-"))):
        return numbers[-1]
    return response.strip()


def load_reasoning_gym() -> RewardFunction:
    """The task's own verifier, given :func:`extract_answer` of the response. Usually in [0, 1]."""
    import reasoning_gym  # noqa: F401  (a second or more: not to be charged to the first response)

    @functools.lru_cache(maxsize=64)
    def scorer(task: str, task_args: str) -> Callable[[str, dict[str, Any]], float]:
        return create_task(task, json.loads(task_args)).score_answer

    def reasoning_gym_reward(prompt: Prompt, response: str) -> float:
        source = prompt.metadata["reasoning_gym"]
        score = scorer(source["task"], json.dumps(source["task_args"]))
        return score(extract_answer(response, prompt.answer), source["entry"])

    return reasoning_gym_reward


def load_math_verify() -> RewardFunction:
    """1.0 where math-verify finds the response mathematically equal to ``prompt.answer``, else 0.0."""
    from math_verify import parse, verify

    # math-verify's own limits are alarm signals; without them it warns, and the pool kills the process instead.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)

    @functools.lru_cache(maxsize=1024)
    def parse_gold(answer: str) -> list[Any]:
        # Bare LaTeX is only read as such inside an environment; left bare, 3\sqrt{2} is read as 3.
        text = answer if "\\boxed" in answer or "$" in answer else f"\\boxed{{{answer}}}"
        gold = parse(text, parsing_timeout=None)
        if not gold:
            raise ValueError(f"math-verify cannot read the answer {answer!r}")
        return gold

    def math_verify_reward(prompt: Prompt, response: str) -> float:
        gold = parse_gold(prompt.answer)
        return float(verify(gold, parse(response, parsing_timeout=None), timeout_seconds=None))

    return math_verify_reward


def load_auto() -> RewardFunction:
    """reasoning_gym for prompts that a reasoning-gym task made, math_verify for all others."""
    task, math = load_reasoning_gym(), load_math_verify()

    def auto_reward(prompt: Prompt, response: str) -> float:
        return (task if "reasoning_gym" in prompt.metadata else math)(prompt, response)

    return auto_reward


BUILT_IN: dict[str, Callable[[], RewardFunction]] = {
    "auto": load_auto,
    "reasoning_gym": load_reasoning_gym,
    "math_verify": load_math_verify,
}


def _last_boxed(response: str) -> str | None:
    """Content of the last ``\\boxed{...}`` whose braces balance."""
    end = len(response)
    while (start := response.rfind("\\boxed{", 0, end)) >= 0:
        begin, depth = start + len("\\boxed{"), 1
        for index in range(begin, len(response)):
            depth += {"{": 1, "}": -1}.get(response[index], 0)
            if depth == 0:
                return response[begin:index]
        end = start
    return None


def _is_number(text: str) -> bool:
    try:
        return Decimal(text.replace(",", "")).is_finite()
    except InvalidOperation:
        return False
