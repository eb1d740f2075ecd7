"""Prints what this environment lacks of a pinned requirements file, one package a line. Standard library only.

Comparing versions takes 0.1 s, finds half-finished installations, and leaves no stamp that could lie.
"""

import json
import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path
from urllib.parse import unquote, urlparse

PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;]+)", re.MULTILINE)


def missing(requirements: str, repository: Path) -> list[str]:
    """Pins of ``requirements`` that are absent or at another version; ``megatron-espo`` unless this version of ``repository`` is installed.

    An earlier version's installation lacks entry points that vLLM looks for.
    """
    lacking = [f"{name}=={version}" for name, version in PIN.findall(requirements) if installed(name) != version]
    own = re.search(r'version="(.+?)"', (repository / "setup.py").read_text())[1]
    is_there = editable_location("megatron-espo") == repository and installed("megatron-espo") == own
    return lacking + ([] if is_there else ["megatron-espo"])


def installed(name: str) -> str | None:
    """Version of an installed distribution without its local part (``2.13.0+cpu`` is ``2.13.0``), or None."""
    try:
        return Distribution.from_name(name).version.split("+")[0]
    except PackageNotFoundError:
        return None


def editable_location(name: str) -> Path | None:
    """Folder that an editable installation points to, or None."""
    try:
        record = json.loads(Distribution.from_name(name).read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        return None
    return Path(unquote(urlparse(record["url"]).path)) if record.get("dir_info", {}).get("editable") else None


if __name__ == "__main__":
    print("\n".join(missing(Path(sys.argv[1]).read_text(), Path(sys.argv[2]).resolve())))
