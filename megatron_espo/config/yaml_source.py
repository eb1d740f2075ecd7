"""YAML with the line of every key, numbers such as 1e-6, and an error for duplicate keys."""

import re
from typing import Any

import yaml

Path = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """Plain scalars of YAML 1.2: ``1e-6`` is a float; ``no`` and ``2024-01-01`` are strings."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?",
        "-+.0123456789",
    ),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
):
    # PyYAML finds resolvers by a scalar's first character; the key of the empty scalar is "".
    _chars = [char.replace("\0", "") for char in _first]
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _chars
    )


class YamlError(Exception):
    """Invalid YAML.

    Attributes:
        problems: ``(line, message)``, lines counted from 1.
    """

    def __init__(self, problems: list[tuple[int, str]]):
        super().__init__("; ".join(message for _, message in problems))
        self.problems = problems


def parse(text: str) -> tuple[Any, dict[Path, int]]:
    """Parse one YAML document.

    Returns:
        The document, and the line (from 1) of each key and list item by path.

    Raises:
        YamlError: the text is not valid, or a mapping has a key twice.
    """
    lines: dict[Path, int] = {}
    duplicates: list[tuple[int, str]] = []
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        _locate(node, (), lines, duplicates)  # an anchor that contains itself: RecursionError
        if duplicates:
            raise YamlError(duplicates)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = f"not valid YAML: {error.problem or error.context}"
        message = f"{what}; a value with : # [ or {{ in it needs quotes"
        raise YamlError([(mark.line + 1 if mark else 1, message)]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise YamlError([(1, f"not valid YAML: {error}")]) from None


def _locate(node: yaml.Node, path: Path, lines: dict[Path, int], duplicates: list) -> None:
    """Fill ``lines`` and ``duplicates``."""
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            lines[*path, index] = child.start_mark.line + 1
            _locate(child, (*path, index), lines, duplicates)
    elif isinstance(node, yaml.MappingNode):
        here: dict[str, int] = {}
        for key, child in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in here and key.tag != "tag:yaml.org,2002:merge":
                dotted = ".".join(map(str, (*path, name)))
                first = f"first in line {here[name]}"
                duplicates.append((line, f"{dotted}: expected once, got it again ({first})"))
            here[name] = lines[*path, name] = line
            _locate(child, (*path, name), lines, duplicates)
