"""YAML with the line of every key, numbers such as 1e-6, and an error for duplicate keys."""

import re
from collections.abc import Callable
from typing import Any

import yaml

from megatron_espo.errors import InputError


class _Loader(yaml.SafeLoader):
    """Plain scalars of YAML 1.2: ``1e-6`` is a float; ``no`` and ``2024-01-01`` are strings."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


for _tag, _pattern in (
    ("null", r"~|null|Null|NULL|"),
    ("bool", r"true|True|TRUE|false|False|FALSE"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"),
    ("merge", r"<<"),
):
    _regexp = re.compile(rf"(?:{_pattern})\Z")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _regexp, None)


def parse(text: str, place: Callable[[int], str]) -> tuple[Any, dict[str, str]]:
    """Parse one YAML document.

    Args:
        place: names a line, counted from 1.

    Returns:
        The document, and the place of each key and list item by its name, such as
        ``algorithm.quantiles[0]``.

    Raises:
        InputError: the text is not valid, or a mapping has a key twice.
    """
    lines: dict[str, int] = {}
    mistakes: list[tuple[int, str]] = []
    document = None
    try:
        loader = _Loader(text)
        if node := loader.get_single_node():
            _locate(node, "", lines, mistakes)  # an anchor that contains itself: RecursionError
            document = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = f"not valid YAML: {error.problem or error.context}"
        message = f"{what}; a value with : # [ or {{ in it needs quotes"
        mistakes.append((mark.line + 1 if mark else 1, message))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mistakes.append((1, f"not valid YAML: {error}"))
    if mistakes:
        raise InputError("\n".join(f"{place(line)}: {message}" for line, message in mistakes))
    return document, {name: place(line) for name, line in lines.items()}


def _locate(node: yaml.Node, path: str, lines: dict[str, int], duplicates: list) -> None:
    """Fill ``lines`` by name, and ``duplicates`` with the line and a message of each."""
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            name = f"{path}[{index}]"
            lines[name] = child.start_mark.line + 1
            _locate(child, name, lines, duplicates)
    elif isinstance(node, yaml.MappingNode):
        here: dict[str, int] = {}
        for key, child in node.value:
            line, name = key.start_mark.line + 1, f"{path}.{key.value}".lstrip(".")
            if name in here and key.tag != "tag:yaml.org,2002:merge":
                first = f"first in line {here[name]}"
                duplicates.append((line, f"{name}: expected once, got it again ({first})"))
            here[name] = lines[name] = line
            _locate(child, name, lines, duplicates)
