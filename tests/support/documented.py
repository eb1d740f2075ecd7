"""The table of metrics in ``docs/metrics.md``."""

import re

from tests.support.distributed import ROOT

_NUMBERS, _WORDS = ("g", "k", "number"), ("objective", "phase", "name")
_PLACEHOLDERS = dict.fromkeys(_NUMBERS, r"\d+") | dict.fromkeys(_WORDS, r"\w+") | {"part": ".+"}
# The names that tests use.
_PLACEHOLDERS["source"] = "math|logic"
_TABLE = (ROOT / "docs" / "metrics.md").read_text().partition("\n### Reward\n")[2]
NAMES: list[str] = re.findall(r"^\| `(\S+)` \|", _TABLE, re.MULTILINE)


def as_pattern(name: str) -> str:
    """A regular expression for the metrics that a documented name stands for."""
    return re.sub("<(.*?)>", lambda placeholder: f"(?:{_PLACEHOLDERS[placeholder[1]]})", name)


def is_documented(metric: str) -> bool:
    return any(re.fullmatch(as_pattern(name), metric) for name in NAMES)
