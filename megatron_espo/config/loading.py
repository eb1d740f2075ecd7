"""A YAML file and ``section.key=value`` overrides to a ``Config``, or one ``InputError`` that lists every mistake."""

import difflib
import json
import os
from typing import Any

from pydantic import ValidationError

from megatron_espo.config import yaml_source
from megatron_espo.config.reference import expectation, item_expectation, sections
from megatron_espo.config.schema import Config
from megatron_espo.errors import InputError

Places = dict[yaml_source.Path, str]

# Settings and values of older releases, and what to use instead.
_REPLACED = {
    "rollout.extra_prompts": "use rollout.max_staleness, and rollout.over_sampling_prompts for the number of prompts",
    "rollout.max_carried_steps": "use rollout.max_staleness",
    "rollout.cpu_kv_cache_gib": "use rollout.engine_args, such as {kv_cache_memory_bytes: 1073741824}",
    "reward.overlap": "leave it out; responses are judged while others are sampled",
}
_REPLACED_VALUES = {
    ("rollout.transport", "shared_memory"): "use files",
    ("rollout.transport", "tcp"): "use files",
}


def load_config(path: str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a run's settings.

    Args:
        path: YAML file, a mapping of sections.
        overrides: ``"section.key=value"``, the value in YAML; they win over the file, later ones over earlier ones.
    Raises:
        InputError: one line for each mistake, ``file:line: section.key: expected ..., got ...``, or
            ``override 'section.key=value': ...``.
    """
    tree, places = _read(path)
    mistakes = [mistake for override in overrides if (mistake := _apply(override, tree, places))]
    if mistakes:
        raise InputError("\n".join(mistakes))
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        lines = [line for entry in error.errors(include_url=False) for line in _explain(entry, path, places)]
        raise InputError("\n".join(dict.fromkeys(lines))) from None
    config.origins[""] = str(path)
    config.origins.update({".".join(map(str, key)): place for key, place in places.items() if len(key) == 2})
    return config


def _read(path: str) -> tuple[dict[str, Any], Places]:
    try:
        with open(path, encoding="utf-8") as stream:
            tree, lines = yaml_source.parse(stream.read())
    except FileNotFoundError:
        raise InputError(f"{path}: expected a YAML configuration file, found none in {os.getcwd()}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read the configuration file: {error.strerror}") from None
    except yaml_source.YamlError as error:
        raise InputError("\n".join(f"{path}:{line}: {message}" for line, message in error.problems)) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: expected UTF-8 text, got byte {error.object[error.start]:#04x}; save it as UTF-8") from None
    if tree is None:
        raise InputError(f"{path}:1: the file is empty; model.path and data.prompts are required")
    if not isinstance(tree, dict):
        raise InputError(f"{path}:1: expected a mapping of sections ({', '.join(sections())}), got {_show(tree)}")
    # A section whose keys are all commented out reads as null.
    tree = {name: {} if value is None and name in sections() else value for name, value in tree.items()}
    return tree, {key: f"{path}:{line}" for key, line in lines.items()}


def _apply(override: str, tree: dict[str, Any], places: Places) -> str | None:
    """Put one override into ``tree``; return what is wrong with it, if anything."""
    place = f"override '{override}'"
    name, equals, text = override.partition("=")
    keys = name.split(".")
    if not equals or not all(keys):
        return f"{place}: expected section.key=value"
    if len(keys) == 1:
        return f"{place}: expected section.key=value, got no section{_suggest_key('', name)}"
    try:
        value, _ = yaml_source.parse(text)
    except yaml_source.YamlError as error:
        return f"{place}: {error}"
    target = tree
    for depth, key in enumerate(keys[:-1], 1):
        held = target.get(key)
        if held is not None and not isinstance(held, dict):
            return f"{place}: {'.'.join(keys[:depth])} is not a mapping, so {keys[depth]} cannot be set in it"
        target[key] = target = dict(held or {})  # a copy: a YAML alias may hold the same mapping elsewhere
    target[keys[-1]] = value
    for old in [key for key in places if key[: len(keys)] == tuple(keys)]:
        del places[old]
    places[tuple(keys)] = place
    return None


def _explain(entry: Any, path: str, places: Places) -> list[str]:
    """Lines for one of pydantic's error entries."""
    kind, location, value = entry["type"], entry["loc"], entry["input"]
    if kind == "rules":
        found = [((*location, *key.split(".")), message) for key, message in entry["ctx"]["problems"]]
        return [f"{_place(key, path, places)}: {_name(key)}: {message}" for key, message in found]
    if kind == "missing":
        message = f"required, but not given; expected {_expected(location)}"
    elif kind == "extra_forbidden":
        replacement = _REPLACED.get(_name(location))
        what = "section" if len(location) == 1 else "key"
        message = f"removed; {replacement}" if replacement else f"unknown {what}{_suggest(location)}"
    elif kind == "invalid_key":
        message = "expected a name as key"
    else:
        message = f"expected {_expected(location)}, got {_show(value)}{_hint(location, kind, value)}"
    return [f"{_place(location, path, places)}: {_name(location)}: {message}"]


def _place(location: yaml_source.Path, path: str, places: Places) -> str:
    """``file:line`` or the override that set ``location``, else those of what holds it, else of what it holds."""
    for length in range(len(location), 0, -1):
        if place := places.get(tuple(location[:length])):
            return place
    return next((place for key, place in places.items() if key[: len(location)] == location), f"{path}:1")


def _name(location: yaml_source.Path) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _expected(location: yaml_source.Path) -> str:
    section = sections()[str(location[0])]
    if len(location) == 1:
        required = [name for name, field in section.model_fields.items() if field.is_required()]
        return "a mapping of keys" + (f" with {', '.join(required)}" if required else "")
    field = section.model_fields[str(location[1])]
    return item_expectation(field) if len(location) > 2 else expectation(field)


def _suggest(location: yaml_source.Path) -> str:
    if len(location) > 1:
        return _suggest_key(str(location[0]), str(location[1]))
    name = str(location[0])
    if close := difflib.get_close_matches(name, sections(), n=1):
        return f'; did you mean "{close[0]}"?'
    return _suggest_key("", name) or f"; the sections are {', '.join(sections())}"


def _suggest_key(section: str, name: str) -> str:
    """The likeliest setting meant: in its own section first, then anywhere."""
    own = list(sections()[section].model_fields) if section in sections() else []
    if close := difflib.get_close_matches(name, own, n=1):
        return f'; did you mean "{section}.{close[0]}"?'
    homes = {key: f"{other}.{key}" for other, model in sections().items() for key in model.model_fields}
    if close := difflib.get_close_matches(name, homes, n=1, cutoff=0.75):
        return f'; did you mean "{homes[close[0]]}"?'
    return f"; the keys of {section} are {', '.join(own)}" if own else ""


def _hint(location: yaml_source.Path, kind: str, value: Any) -> str:
    if isinstance(value, str) and (replacement := _REPLACED_VALUES.get((_name(location), value))):
        return f"; {replacement}"
    if isinstance(value, str) and kind != "string_type":
        try:
            plain, _ = yaml_source.parse(value)
        except yaml_source.YamlError:
            return ""
        if not isinstance(plain, str):
            return " (a string); drop the quotes"
    if kind == "string_type" and value is not None and not isinstance(value, (dict, list)):
        return "; put it in quotes"
    return ""


def _show(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
