"""What every section of the settings is."""

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """Strict, frozen settings. ``problems`` yields ``(key or section.key, message)`` for rules over several keys."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield every broken rule that one field's type and limits cannot express."""
        yield from ()

    @model_validator(mode="after")
    def _refuse_problems(self) -> "Section":
        found = list(self.problems())
        if found:
            text = "; ".join(f"{key}: {message}" for key, message in found)
            raise PydanticCustomError("rules", "{text}", {"text": text, "problems": found})
        return self
