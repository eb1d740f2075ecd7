"""Descriptions of all settings for ``--help`` and error messages."""

import json
import textwrap
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_espo.config.schema import Config

_KINDS = {"boolean": "true or false", "object": "mapping"}
_LIMITS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def sections() -> dict[str, type[BaseModel]]:
    """Section name to its model, in the order of the reference."""
    return {name: field.annotation for name, field in Config.model_fields.items()}  # type: ignore[misc]


def expectation(section: str, key: str) -> str:
    """Type and limits of a setting, such as ``number > 0``, ``one of a, b`` or ``integer >= 1 or
    null``."""
    return _describe(_json_schema(section)[key])


def item_expectation(section: str, key: str) -> str:
    """Type of one item of a list or mapping."""
    kind = _json_schema(section)[key]
    kind = kind.get("anyOf", [kind])[0]
    return _describe(kind.get("items") or kind["additionalProperties"])


@cache
def _json_schema(section: str) -> dict[str, dict[str, Any]]:
    return sections()[section].model_json_schema()["properties"]


def _describe(kind: dict[str, Any]) -> str:
    if "anyOf" in kind:
        return " or ".join(map(_describe, kind["anyOf"]))
    if "enum" in kind:
        return f"one of {', '.join(kind['enum'])}"
    if "items" in kind:
        item = _describe(kind["items"])
        return f"list, each {item}" if "enum" in kind["items"] else f"list of {item}s"
    limits = [f"{sign} {kind[name]}" for name, sign in _LIMITS.items() if name in kind]
    adjective = "non-empty " if "minLength" in kind else ""
    name = _KINDS.get(kind["type"], kind["type"])
    return f"{adjective}{name} {' and '.join(limits)}".rstrip()


def render_reference(width: int = 100) -> str:
    """Every setting with type, default and description, as plain text."""
    blocks = ["Configuration (YAML sections; on the command line: section.key=value):"]
    indent = " " * 6
    for section, model in sections().items():
        blocks.append(f"\n{section}: {model.__doc__}")
        for key, field in model.model_fields.items():
            default = "required" if field.is_required() else f"default {default_text(field)}"
            blocks.append(f"  {section}.{key}  ({expectation(section, key)}; {default})")
            text = field.description or ""
            blocks.append(
                textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)
            )
    return "\n".join(blocks)


def default_text(field: FieldInfo) -> str:
    """Default of a setting, as YAML."""
    value = field.get_default(call_default_factory=True)
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
