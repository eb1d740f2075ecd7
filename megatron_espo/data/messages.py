"""The forms in which data sets hold chat messages."""

import json
import re
from contextlib import suppress
from typing import Any

# Text with messages in it: JSON, or what Python or numpy prints.
WRITTEN = r"""^\s*(array\()?\[?\s*\{\s*['"](role|content|from|value)['"]\s*:"""
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_OF_SHARE_GPT = {"human": "user", "gpt": "assistant"}


def as_messages(prompt: Any) -> Any:
    """``{role, content}`` messages from JSON text, from one message, from ``{from, value}`` or from
    text parts. Anything else is returned unchanged.
    """
    if isinstance(prompt, str) and re.match(WRITTEN, prompt):
        with suppress(ValueError):
            prompt = json.loads(prompt)
    if isinstance(prompt, dict):
        prompt = [prompt]
    return [_message(item) for item in prompt] if isinstance(prompt, list) else prompt


def _message(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    if {"from", "value"} <= message.keys() and message.get("role") is None:
        role = message["from"]
        return {"role": _OF_SHARE_GPT.get(role, role), "content": message["value"]}
    parts = message.get("content")
    if isinstance(parts, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in parts
    ):
        return message | {"content": "".join(part["text"] for part in parts)}
    return message


def find_problem(prompt: Any) -> str | None:
    """What is wrong with a prompt that is text or messages; ``None``: nothing."""
    if isinstance(prompt, str):
        if re.match(WRITTEN, prompt):
            return f"expected messages as a list or as JSON, got their text {prompt[:60]!r}"
        return None if prompt.strip() else "expected text, got an empty one"
    if not isinstance(prompt, list) or not prompt:
        return f"expected text or a list of messages, got {describe(prompt)}"
    for index, message in enumerate(prompt):
        fields = message if isinstance(message, dict) else {}
        role, content = fields.get("role"), fields.get("content")
        if not (isinstance(role, str) and isinstance(content, str)):
            got = describe(message)
            return f"expected {{role, content}} with text in both at [{index}], got {got}"
        if role not in ROLES:
            return f"expected a role out of {', '.join(ROLES)} at [{index}], got {role!r}"
    last = prompt[-1]
    if last["role"] in ("assistant", "system", "developer"):
        return f"expected the user's message last, got the {last['role']}'s"
    return None if last["content"].strip() else "expected text in the last message, got none"


def describe(value: Any) -> str:
    """Type and beginning of a value."""
    return f"{type(value).__name__} {shorten(repr(value))}"


def shorten(value: str | bytes) -> str:
    """At most 60 characters."""
    text = value.decode("utf-8", "replace").strip() if isinstance(value, bytes) else value
    return text if len(text) <= 60 else text[:57] + "..."
