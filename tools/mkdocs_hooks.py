"""What the site needs beyond Markdown that GitHub shows too: equations as MathML, links into the repository, pages that ``nav`` lacks."""

import re
from pathlib import Path

from latex2mathml.converter import convert

CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)
MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", re.DOTALL)
OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)]+)\)")


def on_config(config):
    """List every page of ``docs/``: those without a place come last."""
    listed = re.findall(r"[\w.-]+\.md", str(config.nav))
    rest = sorted({page.name for page in Path(config.docs_dir).glob("*.md")} - set(listed))
    config.nav += [{"More": rest}] if rest else []
    return config


def on_page_markdown(markdown: str, *, config, **_) -> str:
    """Equations to MathML; links to files outside ``docs/`` go to ``repo_url``, or without one become plain text."""
    parts = CODE.split(markdown)
    parts[::2] = [MATH.sub(_mathml, part) for part in parts[::2]]
    target = rf"[\1]({config.repo_url.rstrip('/')}/blob/main/\2)" if config.repo_url else r"\1"
    return OUTSIDE.sub(target, "".join(parts)).replace("/blob/main/../", "/blob/main/")


def _mathml(match: re.Match) -> str:
    if match[1]:
        return convert(match[1], display="block")
    # In a span: a line that began with <math> would be a block of its own.
    return f"<span>{convert(match[2])}</span>"
