"""Descriptions of all settings for ``--help`` and error messages."""

import json
import textwrap
import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_espo.config.schema import Config

_PLAIN = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "true or false",
    dict: "mapping",
    types.NoneType: "null",
}


def sections() -> dict[str, type[BaseModel]]:
    """Section name to its model, in the order of the reference."""
    return {name: field.annotation for name, field in Config.model_fields.items()}  # type: ignore[misc]


def expectation(field: FieldInfo) -> str:
    """Type and limits of a setting, such as ``number > 0``, ``one of a, b`` or ``integer >= 1 or
    null``."""
    limits, adjective = [], ""
    for limit in field.metadata:
        for attribute, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
            if (bound := getattr(limit, attribute, None)) is not None:
                limits.append(f" {sign} {bound}")
        if getattr(limit, "min_length", None):
            adjective = "non-empty "
    return adjective + _describe_type(field.annotation, " and".join(limits))


def item_expectation(field: FieldInfo) -> str:
    """Type of one item of a list setting."""
    return _describe_type(get_args(field.annotation)[0])


def _describe_type(kind: Any, limits: str = "") -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return f"{_describe_type(arguments[0], limits)} or null"
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is tuple:
        item = _describe_type(arguments[0])
        return f"list, each {item}" if item.startswith("one of") else f"list of {item}s"
    return _PLAIN[origin or kind] + limits


def render_reference(width: int = 100) -> str:
    """Every setting with type, default and description, as plain text."""
    blocks = ["Configuration (YAML sections; on the command line: section.key=value):"]
    indent = " " * 6
    for section, model in sections().items():
        blocks.append(f"\n{section}: {model.__doc__}")
        for key, field in model.model_fields.items():
            default = "required" if field.is_required() else f"default {default_text(field)}"
            blocks.append(f"  {section}.{key}  ({expectation(field)}; {default})")
            text = field.description or ""
            blocks.append(
                textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)
            )
    return "\n".join(blocks)


def default_text(field: FieldInfo) -> str:
    """Default of a setting, as YAML."""
    value = field.get_default(call_default_factory=True)
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
