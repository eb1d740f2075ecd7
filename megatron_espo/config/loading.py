"""Reads a YAML file and ``section.key=value`` overrides into a ``Config``. One ``InputError``
lists every mistake."""

import difflib
import os
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from megatron_espo.config import yaml_source
from megatron_espo.config.reference import expectation, keys_of, sections
from megatron_espo.config.rules import show
from megatron_espo.config.schema import Config
from megatron_espo.errors import InputError

Places = dict[yaml_source.Path, str]

# Settings of older releases, and what to use or what happens instead.
_REMOVED = {
    "algorithm.normalize_std": "use algorithm.advantage: grpo (true) or dr_grpo (false)",
    "environment.max_concurrent": "at most 4096 trajectories run at the same time",
    "environment.retries": "a failed trajectory is started once more",
    "eval.max_response_tokens": "use rollout.max_response_tokens, which limits evaluations too",
    "eval.top_p": "evaluations use rollout.top_p",
    "judge.cache": "equal requests of a run are sent once",
    "optimizer.lr_decay_iters": "the learning rate decays over all optimizer steps of the run",
    "optimizer.spike_window": "optimizer.spike_factor compares with the last 50 gradient norms",
    "reward.overlap": "rewards are computed while other responses are sampled",
    "reward.overlong_penalty": "the overlong penalty is 1 at the length limit",
    "rollout.allow_router_mismatch": "rollout.router_replay=false needs "
    "algorithm.rollout_correction token, sequence or geometric",
    "rollout.allow_truncated_sampling": "training uses the ids that top_p and top_k kept",
    "rollout.canary_tolerance": "the limit is 0.1 nats in bfloat16 and 0.001 in float32; "
    "rollout.canary_prompts=0 turns the comparison off",
    "rollout.cpu_kv_cache_gib": "use rollout.engine_args={kv_cache_memory_bytes: 1073741824}",
    "rollout.dtype": "engines use model.dtype",
    "rollout.extra_prompts": "use rollout.max_staleness and rollout.over_sampling_prompts",
    "rollout.log_prob_gap_warn": "the limit is 0.05 nats; see also rollout.log_prob_gap_stop",
    "rollout.longest_first": "prompts are dispatched in the order of the data",
    "rollout.max_carried_steps": "use rollout.max_staleness",
    "run.agree_every": "ranks compare their weights every 10 optimizer steps",
    "run.name": "a run has the name of its folder, run.dir",
}
_REMOVED_VALUES = {
    ("rollout.transport", "shared_memory"): "use files",
    ("rollout.transport", "tcp"): "use files",
}


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
    mistakes = [mistake for override in overrides if (mistake := _apply(override, tree, places))]
    if mistakes:
        raise InputError("\n".join(mistakes))
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        entries = error.errors(include_url=False)
        lines = [line for entry in entries for line in _explain(entry, path, places)]
        raise InputError("\n".join(dict.fromkeys(lines))) from None
    config.origins[""] = str(path)
    for key, place in places.items():
        for depth in range(2, len(key) + 1):
            config.origins.setdefault(".".join(map(str, key[:depth])), place)
    return config


def _read(path: str) -> tuple[dict[str, Any], Places]:
    try:
        with open(path, encoding="utf-8") as stream:
            tree, lines = yaml_source.parse(stream.read())
    except FileNotFoundError:
        expected = "expected a YAML configuration file"
        raise InputError(f"{path}: {expected}, found none in {os.getcwd()}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read the configuration file: {error.strerror}") from None
    except yaml_source.YamlError as error:
        problems = [f"{path}:{line}: {message}" for line, message in error.problems]
        raise InputError("\n".join(problems)) from None
    except UnicodeDecodeError as error:
        line, byte = error.object[: error.start].count(b"\n") + 1, error.object[error.start]
        raise InputError(f"{path}:{line}: expected UTF-8 text, got byte {byte:#04x}") from None
    if tree is None:
        raise InputError(f"{path}:1: the file is empty; model.path and data.prompts are required")
    known = sections()
    if not isinstance(tree, dict):
        expected = f"a mapping of sections ({', '.join(known)})"
        raise InputError(f"{path}:1: expected {expected}, got {show(tree)}")
    # A section whose keys are all commented out reads as null.
    tree = {k: {} if value is None and k in known else value for k, value in tree.items()}
    return tree, {key: f"{path}:{line}" for key, line in lines.items()}


def _apply(override: str, tree: dict[str, Any], places: Places) -> str | None:
    """Apply one override to ``tree``. Return a message if it is wrong."""
    place = f"override '{override}'"
    name, equals, text = override.partition("=")
    keys = name.split(".")
    if not equals or not all(keys):
        return f"{place}: expected section.key=value"
    if len(keys) == 1:
        return f"{place}: expected section.key=value, got no section{_suggest([], name)}"
    try:
        value, _ = yaml_source.parse(text)
    except yaml_source.YamlError as error:
        return f"{place}: {error}"
    target = tree
    for depth, key in enumerate(keys[:-1], 1):
        inner = target.get(key)
        if inner is not None and not isinstance(inner, dict):
            parent = ".".join(keys[:depth])
            return f"{place}: {parent} is not a mapping, so {keys[depth]} cannot be set in it"
        # Copy, because a YAML alias may share the mapping with another key.
        target[key] = target = dict(inner or {})
    target[keys[-1]] = value
    for old in [key for key in places if key[: len(keys)] == tuple(keys)]:
        del places[old]
    places[tuple(keys)] = place
    return None


def _explain(entry: Any, path: str, places: Places) -> list[str]:
    """Messages for one of pydantic's error entries."""
    kind, location, value = entry["type"], entry["loc"], entry["input"]
    if kind == "rules":
        found = [((*location, *k.split(".")), message) for k, message in entry["ctx"]["problems"]]
    elif kind == "missing":
        found = [(location, f"required, but not given; expected {_expected(location)}")]
    elif kind == "extra_forbidden":
        *above, name = location
        what = f"unknown {'key' if above else 'section'}{_suggest(above, name)}"
        instead = _REMOVED.get(_name(location))
        found = [(location, f"removed; {instead}" if instead else what)]
    elif kind == "invalid_key":
        found = [(location, "expected a name as key")]
    else:
        got = f"{show(value)}{_hint(location, kind, value)}"
        found = [(location, f"expected {_expected(location)}, got {got}")]
    return [f"{_place(key, path, places)}: {_name(key)}: {message}" for key, message in found]


def _place(location: yaml_source.Path, path: str, places: Places) -> str:
    """``file:line`` or the override that set ``location``, or else its nearest parent or first
    child."""
    for length in range(len(location), 0, -1):
        if place := places.get(tuple(location[:length])):
            return place
    inside = (place for key, place in places.items() if key[: len(location)] == location)
    return next(inside, f"{path}:1")


def _name(location: yaml_source.Path) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return "".join(parts).lstrip(".")


def _expected(location: yaml_source.Path) -> str:
    return expectation(*map(str, location))


def _suggest(above: Sequence[Any], name: str) -> str:
    """The most similar section or key: of the same mapping, or else of any section."""
    homes = {key: f"{home}.{key}" for home, m in sections().items() for key in m.model_fields}
    own = {key: ".".join([*above, key]) for key in keys_of(*above)}
    for known, cutoff in ((own, 0.6), (homes, 0.75)):
        if close := difflib.get_close_matches(name, known, n=1, cutoff=cutoff):
            return f'; did you mean "{known[close[0]]}"?'
    return f"; known are {', '.join(own)}"


def _hint(location: yaml_source.Path, kind: str, value: Any) -> str:
    if kind == "string_type":
        is_scalar = value is not None and not isinstance(value, (dict, list))
        return "; put it in quotes" if is_scalar else ""
    if not isinstance(value, str):
        return ""
    if instead := _REMOVED_VALUES.get((_name(location), value)):
        return f"; {instead}"
    try:
        plain, _ = yaml_source.parse(value)
    except yaml_source.YamlError:
        return ""
    return "" if isinstance(plain, str) else " (a string); drop the quotes"
