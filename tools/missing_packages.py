"""Prints the pinned packages that this environment lacks, one a line. Standard library only.

It compares installed versions (0.1 s), so it also finds incomplete and older environments.
"""

import json
import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path
from urllib.parse import unquote, urlparse

PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;]+)", re.MULTILINE)


def missing(requirements: str, repository: Path) -> list[str]:
    """Pins of ``requirements`` that are absent or at another version.

    ``megatron-espo`` is added unless this version of ``repository`` is installed: an earlier one
    lacks entry points that vLLM needs.
    """
    lacking = [
        f"{name}=={version}"
        for name, version in PIN.findall(requirements)
        if installed(name) != version
    ]
    own = re.search(r'version="(.+?)"', (repository / "setup.py").read_text())[1]
    if editable_location("megatron-espo") != repository or installed("megatron-espo") != own:
        lacking.append("megatron-espo")
    return lacking


def installed(name: str) -> str | None:
    """Installed version without its local part (``2.13.0+cpu`` is ``2.13.0``), or None."""
    try:
        return Distribution.from_name(name).version.split("+")[0]
    except PackageNotFoundError:
        return None


def editable_location(name: str) -> Path | None:
    """Folder of an editable installation, or None."""
    try:
        record = json.loads(Distribution.from_name(name).read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        return None
    is_editable = record.get("dir_info", {}).get("editable")
    return Path(unquote(urlparse(record["url"]).path)) if is_editable else None


if __name__ == "__main__":
    repository, *files = map(Path, sys.argv[1:])
    pins = "".join(file.read_text() for file in files)
    print("\n".join(missing(pins, repository.resolve())))
