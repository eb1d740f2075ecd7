"""The base class of every section, and what the rules of several sections share."""

import re
from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

Problems = Iterator[tuple[str, str]]

# vLLM silently raises lower temperatures to this value.
LOWEST_TEMPERATURE = 0.01
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class Section(BaseModel):
    """Strict, frozen settings. The docstring of a field is its description in the reference."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    def problems(self) -> Problems:
        """Yield ``(key or section.key, message)`` for each broken rule over several fields."""
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
        expected = " or ".join(("module:function", *others))
        yield key, f'expected {expected}, got "{name}"'
