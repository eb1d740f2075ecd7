"""Descriptions of all settings for ``--help`` and error messages."""

import json
import textwrap
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_espo.config.schema import Config
from megatron_espo.config.tasks import Source

_KINDS = {"boolean": "true or false", "object": "mapping"}
_LIMITS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def sections() -> dict[str, type[BaseModel]]:
    """Section name to its model, in the order of the reference."""
    return {name: field.annotation for name, field in Config.model_fields.items()}  # type: ignore[misc]


def described() -> dict[str, type[BaseModel]]:
    """:func:`sections`, and the mappings of settings inside them."""
    return sections() | {"data.mixture.<name>": Source}


def expectation(*path: Any) -> str:
    """Type and limits of a setting or of an item in it, such as ``number > 0``, ``one of a, b`` or
    ``integer >= 1 or null``."""
    return _describe(_kind(*path))


def keys_of(*path: str) -> list[str]:
    """Keys of a mapping of settings; without ``path``: the sections."""
    return list(_kind(*path)["properties"])


@cache
def _json_schema() -> dict[str, Any]:
    return Config.model_json_schema()


def _kind(*path: Any) -> dict[str, Any]:
    """JSON schema of what is at ``path``."""
    kind = schema = _json_schema()
    for key in path:
        kind = kind.get("anyOf", [kind])[0]
        known = kind.get("properties", {})
        kind = known.get(key) or kind.get("items") or kind["additionalProperties"]
        if "$ref" in kind:
            kind = schema["$defs"][kind["$ref"].rpartition("/")[2]]
    return kind


def _describe(kind: dict[str, Any]) -> str:
    if "properties" in kind:
        required = ", ".join(kind.get("required", ()))
        return "a mapping of keys" + (f" with {required}" if required else "")
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


def render_reference() -> str:
    """Every setting with type, default and description, as plain text."""
    blocks = ["Configuration (YAML sections; on the command line: section.key=value):"]
    for section, model in described().items():
        blocks.append(f"\n{section}: {model.__doc__}")
        for key, field in model.model_fields.items():
            default = "required" if field.is_required() else f"default {default_text(field)}"
            kind = expectation(*section.split("."), key)
            text = textwrap.fill(field.description or "", 94)
            blocks.append(f"  {section}.{key}  ({kind}; {default})")
            blocks.append(textwrap.indent(text, " " * 6))
    return "\n".join(blocks)


def default_text(field: FieldInfo) -> str:
    """Default of a setting, as YAML."""
    value = field.get_default(call_default_factory=True)
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
