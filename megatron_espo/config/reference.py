"""Every setting in words: for ``--help``, for ``docs/configuration.md``, and for the "expected ..." part of error messages."""

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
    """Type and limits of a setting in words: ``number > 0``, ``one of constant, linear``, ``integer >= 1 or null``."""
    limits, adjective = [], ""
    for limit in field.metadata:
        for attribute, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
            if (bound := getattr(limit, attribute, None)) is not None:
                limits.append(f" {sign} {bound}")
        if getattr(limit, "min_length", None):
            adjective = "non-empty "
    return adjective + _type_in_words(field.annotation, " and".join(limits))


def item_expectation(field: FieldInfo) -> str:
    """Type in words of one item of a list setting."""
    return _type_in_words(get_args(field.annotation)[0])


def _type_in_words(annotation: Any, limits: str = "") -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return f"{_type_in_words(arguments[0], limits)} or null"
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is tuple:
        item = _type_in_words(arguments[0])
        return f"list, each {item}" if item.startswith("one of") else f"list of {item}s"
    return _PLAIN[origin or annotation] + limits


def render_reference(width: int = 100) -> str:
    """Every field, by section: ``key (type, default)`` and its description."""
    blocks = ["Configuration (YAML sections; on the command line: section.key=value):"]
    for section, model in sections().items():
        blocks.append(f"\n{section}: {model.__doc__}")
        for key, field in model.model_fields.items():
            default = "required" if field.is_required() else f"default {_default(field)}"
            blocks.append(f"  {section}.{key}  ({expectation(field)}; {default})")
            blocks.append(
                textwrap.fill(field.description or "", width, initial_indent=" " * 6, subsequent_indent=" " * 6)
            )
    return "\n".join(blocks)


def render_markdown() -> str:
    """``docs/configuration.md``: every field, a table for each section."""
    blocks = [
        "# Configuration\n",
        "<!-- Written by `bash tools/docs.sh` from megatron_espo/config; change it there. -->\n",
        "A run's settings are a YAML file of these sections; `section.key=value` on the command line wins over it. Unknown keys, wrong types and",
        "settings that contradict each other are errors before anything is loaded.",
    ]
    for section, model in sections().items():
        rows = [
            f"| `{key}` | {expectation(field)} | {'required' if field.is_required() else f'`{_default(field)}`'} | {field.description} |"
            for key, field in model.model_fields.items()
        ]
        blocks += [f"\n## {section}\n", f"{model.__doc__}\n", "| key | value | default | what |", "|---|---|---|---|"]
        blocks += [row.replace("<", "&lt;") for row in rows]
    return "\n".join(blocks) + "\n"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)
