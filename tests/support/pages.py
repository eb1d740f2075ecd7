"""Reads links, headings and fenced snippets of README, CONTRIBUTING and ``docs/``."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.distributed import ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Snippet:
    """A fenced block."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def snippets(*languages: str) -> list[Snippet]:
    """All fenced blocks in some languages, without the indentation of a list they may stand in."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in FENCE.finditer(text):
            indent, language, body = match.groups()
            line = text.count("\n", 0, match.start()) + 1
            body = re.sub(f"^{indent}", "", body, flags=re.MULTILINE)
            found.append(Snippet(str(page.relative_to(ROOT)), line, language, body))
    return [snippet for snippet in found if not languages or snippet.language in languages]


def prose(page: Path) -> str:
    """The text without fenced blocks."""
    return FENCE.sub("", page.read_text())


def links(page: Path) -> list[tuple[str, str]]:
    """``(text, target)`` of every link and picture."""
    return LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """Targets of ``#...`` on a page, as GitHub and mkdocs make them of headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).strip().replace(" ", "-")
        for heading in headings
    }


def command_lines(snippet: Snippet) -> Iterator[list[str]]:
    """Words of each command of a bash block: comments, placeholders (``...``) and settings of
    variables left out.
    """
    for line in snippet.text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in (";", "&&"):
                words += (
                    [] if word == "..." or (not words and re.match(r"[A-Z_]+=", word)) else [word]
                )
            elif words:
                yield words
                words = []
