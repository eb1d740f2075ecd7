"""The base class of every section, and what the rules of several sections share."""

import json
import re
from collections.abc import Iterator
from operator import attrgetter
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Problem = tuple[str, str]
"""``(key or section.key, message)`` of a broken rule."""
Problems = Iterator[Problem]

T = TypeVar("T")
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
# A list in the file.
Items = Annotated[tuple[T, ...], Field(strict=False)]

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def show(value: Any) -> str:
    """A value as YAML on one line of at most 80 characters."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def locate(places: dict[str, str], key: str, message: str) -> str:
    """Prepend the place where a setting was given, or else the nearest mapping around it."""
    name = key
    while name and name not in places:
        name = name[: max(name.rfind("."), name.rfind("["), 0)]
    place = places.get(name)
    return f"{place}: {key}: {message}" if place else f"{key}: {message}"


class Section(BaseModel):
    """Strict, frozen settings. The docstring of a field is its description in the reference."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def expect(self, key: str, expected: str, got: Any = None, advice: str = "") -> Problem:
        """A problem: what the setting ``key`` should be, and what it is (by default, its value)."""
        value = attrgetter(key)(self) if got is None else got
        message = f"expected {expected}, got {show(value)}"
        return key, f"{message}; {advice}" if advice else message

    def expect_function(self, key: str, name: str | None, *others: str) -> Problems:
        """A problem where ``name`` is neither ``module:function`` nor one of ``others``."""
        if name is not None and name not in others and not FUNCTION.fullmatch(name):
            yield self.expect(key, " or ".join(("module:function", *others)), name)

    def problems(self) -> Problems:
        """Broken rules over several fields."""
        yield from ()

    @model_validator(mode="after")
    def _check_problems(self) -> "Section":
        if found := list(self.problems()):
            text = "; ".join(f"{key}: {message}" for key, message in found)
            raise PydanticCustomError("rules", "{text}", {"text": text, "problems": found})
        return self
