"""Reads a YAML file and ``section.key=value`` overrides into a ``Config``. One ``InputError``
lists every mistake."""

import difflib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_espo.config import yaml_source
from megatron_espo.config.reference import expectation, keys_of, sections
from megatron_espo.config.rules import Problems, locate, show
from megatron_espo.config.schema import Config
from megatron_espo.errors import InputError


def load_config(path: str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read the settings of a run.

    Args:
        path: YAML file, a mapping of sections.
        overrides: ``"section.key=value"`` with the value in YAML. They replace values of the file;
            later ones win.

    Raises:
        InputError: one line per mistake, ``file:line: section.key: expected ..., got ...`` or
            ``override 'section.key=value': ...``.
    """
    tree, places = _read(path)
    mistakes = []
    for override in overrides:
        try:
            _apply(override, tree, places)
        except InputError as error:
            mistakes.append(str(error))
    if mistakes:
        raise InputError("\n".join(mistakes))
    places[""] = f"{path}:1"
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        found = [problem for entry in error.errors() for problem in _explain(entry)]
        lines = [locate(places, key, message) for key, message in found]
        raise InputError("\n".join(dict.fromkeys(lines))) from None
    config.origins.update((key, place) for key, place in places.items() if "." in key)
    config.origins[""] = f"{path} (default)"
    return config


def _read(path: str) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        got = f"got {error.strerror} (in {os.getcwd()})"
        raise InputError(f"{path}: expected a YAML configuration file, {got}") from None
    except UnicodeDecodeError as error:
        line, byte = error.object[: error.start].count(b"\n") + 1, error.object[error.start]
        raise InputError(f"{path}:{line}: expected UTF-8 text, got byte {byte:#04x}") from None
    tree, places = yaml_source.parse(text, lambda line: f"{path}:{line}")
    if tree is None:
        raise InputError(f"{path}:1: the file is empty; model.path and data.prompts are required")
    known = sections()
    if not isinstance(tree, dict):
        expected = f"a mapping of sections ({', '.join(known)})"
        raise InputError(f"{path}:1: expected {expected}, got {show(tree)}")
    # A section whose keys are all commented out reads as null.
    return {k: {} if value is None and k in known else value for k, value in tree.items()}, places


def _apply(override: str, tree: dict[str, Any], places: dict[str, str]) -> None:
    """Apply one override to ``tree``. InputError if it is wrong."""
    place = f"override '{override}'"
    name, equals, text = override.partition("=")
    keys = name.split(".")
    if not equals or not all(keys):
        raise InputError(f"{place}: expected section.key=value")
    if len(keys) == 1:
        got = f"got no section{_suggest([], name)}"
        raise InputError(f"{place}: expected section.key=value, {got}")
    value, _ = yaml_source.parse(text, lambda _: place)
    target = tree
    for depth, key in enumerate(keys[:-1], 1):
        parent = ".".join(keys[:depth])
        inner = target.get(key)
        if inner is not None and not isinstance(inner, dict):
            what = f"{parent} is not a mapping, so {keys[depth]} cannot be set in it"
            raise InputError(f"{place}: {what}")
        # Copy, because a YAML alias may share the mapping with another key.
        target[key] = target = dict(inner or {})
        if parent not in sections():  # whose other keys are set elsewhere
            places.setdefault(parent, place)
    target[keys[-1]] = value
    for old in [key for key in places if key.startswith((f"{name}.", f"{name}["))]:
        del places[old]
    places[name] = place


def _explain(entry: Any) -> Problems:
    """The problems in one of pydantic's error entries."""
    kind, location, value = entry["type"], entry["loc"], entry["input"]
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    name = "".join(parts).lstrip(".")
    if kind == "rules":
        for key, message in entry["ctx"]["problems"]:
            yield f"{name}.{key}".lstrip("."), message
    elif kind == "missing":
        yield name, f"required, but not given; expected {expectation(*location)}"
    elif kind == "extra_forbidden":
        *above, key = location
        yield name, f"unknown {'key' if above else 'section'}{_suggest(above, key)}"
    elif kind == "invalid_key" or location[-1:] == ("[key]",):
        yield name.removesuffix(".[key]"), "expected a name as key"
    else:
        got = f"{show(value)}{_hint(kind, value)}"
        yield name, f"expected {expectation(*location)}, got {got}"


def _suggest(above: Sequence[Any], name: str) -> str:
    """The most similar section or key: of the same mapping, or else of any section."""
    homes = {key: f"{home}.{key}" for home, m in sections().items() for key in m.model_fields}
    own = {key: ".".join([*above, key]) for key in keys_of(*above)}
    for known, cutoff in ((own, 0.6), (homes, 0.75)):
        if close := difflib.get_close_matches(name, known, n=1, cutoff=cutoff):
            return f'; did you mean "{known[close[0]]}"?'
    return f"; known are {', '.join(own)}"


def _hint(kind: str, value: Any) -> str:
    if kind == "string_type" and isinstance(value, int | float):
        return "; put it in quotes"
    if isinstance(value, str):
        with suppress(InputError):
            plain, _ = yaml_source.parse(value, str)
            return "" if isinstance(plain, str) else " (a string); drop the quotes"
    return ""
