"""YAML with the place of every key, numbers as they are written in papers (1e-6), and no duplicate keys."""

import re
from typing import Any

import yaml

Path = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: ``1e-6`` is a float, ``no`` and ``2024-01-01`` are strings."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
):
    # PyYAML looks resolvers up by a scalar's first character, the empty scalar's under "".
    _chars = [char.replace("\0", "") for char in _first]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _chars)


class YamlError(ValueError):
    """Text that cannot be used; ``problems`` holds ``(line, message)``, the line counted from 1."""

    def __init__(self, problems: list[tuple[int, str]]):
        super().__init__("; ".join(message for _, message in problems))
        self.problems = problems


def parse(text: str) -> tuple[Any, dict[Path, int]]:
    """Return ``text``'s one document and the line (from 1) of each key and list item, by path. YamlError otherwise."""
    lines: dict[Path, int] = {}
    duplicates: list[tuple[int, str]] = []
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        _locate(node, (), lines, duplicates, {})
        if duplicates:
            raise YamlError(duplicates)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError([(mark.line + 1 if mark else 1, f"not valid YAML: {error.problem or error.context}; a value with : # [ or {{ in it needs quotes")]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, YamlError):
            raise
        raise YamlError([(1, f"not valid YAML: {error}")]) from None


def _locate(node: yaml.Node, path: Path, lines: dict[Path, int], duplicates: list, done: dict[int, bool]) -> None:
    if id(node) in done:  # an alias, located where it was anchored
        if not done[id(node)]:
            raise YamlError([(node.start_mark.line + 1, "not valid here: an anchor that contains itself")])
        return
    done[id(node)] = False
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            lines[*path, index] = child.start_mark.line + 1
            _locate(child, (*path, index), lines, duplicates, done)
    elif isinstance(node, yaml.MappingNode):
        here: dict[str, int] = {}
        for key, child in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if key.tag != "tag:yaml.org,2002:merge" and name in here:
                dotted = ".".join(str(part) for part in (*path, name))
                duplicates.append((line, f"{dotted}: expected once, got it again (first in line {here[name]})"))
            here[name] = lines[*path, name] = line
            _locate(child, (*path, name), lines, duplicates, done)
    done[id(node)] = True
