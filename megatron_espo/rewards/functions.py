"""Reward functions. Each scores one response; ``pool`` runs them in processes with limits."""

import functools
import inspect
import json
from collections.abc import Callable
from typing import Any

from megatron_espo.data.reasoning_gym_task import create_task
from megatron_espo.errors import InputError
from megatron_espo.plugins import load_object
from megatron_espo.rewards.answers import MathJudge, extract_answer
from megatron_espo.types import Prompt

# Scores a prompt's response with a finite real number. Runs in a worker process.
RewardFunction = Callable[[Prompt, str], float]


def load_reward_function(name: str) -> RewardFunction:
    """Load the reward function ``name`` with everything that it imports.

    Args:
        name: ``auto`` (reasoning_gym for reasoning-gym prompts, math_verify for others),
            ``reasoning_gym``, ``math_verify``, or ``module:function``, looked up on ``sys.path``.

    Raises:
        InputError: no such module or function, or it does not take a prompt and a response. Other
            exceptions than ImportError pass through.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]()
    function = load_object("reward.function", name, "module:function")
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:  # also if it is not a function
        expected = f"expected {name} to take (prompt, response)"
        raise InputError(f"reward.function: {expected}: {error}") from None
    except ValueError:  # a function in C may have no signature
        pass
    return function


def load_reasoning_gym() -> RewardFunction:
    """Return the task's own verifier on :func:`extract_answer`. Usually in [0, 1]."""
    import reasoning_gym  # noqa: F401  (takes a second or more, which the first response must not)

    @functools.lru_cache(maxsize=64)
    def scorer(task: str, task_args: str) -> Callable[[str, dict[str, Any]], float]:
        return create_task(task, json.loads(task_args)).score_answer

    def reasoning_gym_reward(prompt: Prompt, response: str) -> float:
        source = prompt.metadata["reasoning_gym"]
        score = scorer(source["task"], json.dumps(source["task_args"]))
        answer = extract_answer(response, prompt.answer, prompt.text)
        return 0.0 if answer is None else score(answer, source["entry"])

    return reasoning_gym_reward


def load_math_verify() -> RewardFunction:
    """Return 1.0 where math-verify finds the response equal to ``prompt.answer``, else 0.0."""
    judge = MathJudge()
    return lambda prompt, response: float(judge(prompt.answer, response, prompt.text))


def load_auto() -> RewardFunction:
    """Return reasoning_gym for prompts of a reasoning-gym task, math_verify for the others."""
    task, math = load_reasoning_gym(), load_math_verify()
    return lambda prompt, response: (task if "reasoning_gym" in prompt.metadata else math)(
        prompt, response
    )


BUILT_IN: dict[str, Callable[[], RewardFunction]] = {
    "auto": load_auto,
    "reasoning_gym": load_reasoning_gym,
    "math_verify": load_math_verify,
}
