"""The base class of every section, and what the rules of several sections share."""

import json
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

Problems = Iterator[tuple[str, str]]
"""``(key or section.key, message)`` of each broken rule."""

# vLLM silently raises lower temperatures to this value.
LOWEST_TEMPERATURE = 0.01
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def expect(key: str, expected: str, got: Any, advice: str = "") -> tuple[str, str]:
    """A problem: what the setting ``key`` should be, and what it is."""
    message = f"expected {expected}, got {show(got)}"
    return key, f"{message}; {advice}" if advice else message


def show(value: Any) -> str:
    """A value as YAML on one line of at most 80 characters."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


class Section(BaseModel):
    """Strict, frozen settings. The docstring of a field is its description in the reference."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def problems(self) -> Problems:
        """Broken rules over several fields."""
        yield from ()

    @model_validator(mode="after")
    def _check_problems(self) -> "Section":
        if found := list(self.problems()):
            text = "; ".join(f"{key}: {message}" for key, message in found)
            raise PydanticCustomError("rules", "{text}", {"text": text, "problems": found})
        return self


def check_function(key: str, name: str | None, *others: str) -> Problems:
    """A problem where ``name`` is neither ``module:function`` nor one of ``others`` nor
    ``None``."""
    if name is not None and name not in others and not FUNCTION.fullmatch(name):
        yield expect(key, " or ".join(("module:function", *others)), name)
