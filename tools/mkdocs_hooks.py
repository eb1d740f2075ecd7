"""mkdocs hooks: MathML equations, links to files outside ``docs/``, docstrings of public names."""

import re
from pathlib import Path

from latex2mathml.converter import convert

CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)
MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", re.DOTALL)
OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)]+)\)")
# A Sphinx role in a docstring, as mkdocstrings renders it.
ROLE = re.compile(r":(?:class|func|meth|attr|mod|data):(?=<(?:code|a|autoref)\b)")
PUBLIC = re.compile(r'^    "(\w+)": "(megatron_espo[\w.]*)",$', re.MULTILINE)


def on_page_markdown(markdown: str, *, config, **_) -> str:
    """Convert equations and links to files outside ``docs/``; list the public names."""
    parts = CODE.split(markdown)
    parts[::2] = [MATH.sub(_mathml, part) for part in parts[::2]]
    target = rf"[\1]({config.repo_url.rstrip('/')}/blob/main/\2)" if config.repo_url else r"\1"
    text = OUTSIDE.sub(target, "".join(parts)).replace("/blob/main/../", "/blob/main/")
    if "<!-- docstrings -->" not in text:
        return text
    package = Path(config.config_file_path).with_name("megatron_espo") / "__init__.py"
    # docs/configuration.md documents Config.
    names = [
        f"::: {m}.{name}" for name, m in PUBLIC.findall(package.read_text()) if name != "Config"
    ]
    return text.replace("<!-- docstrings -->", "\n\n".join(names))


def on_page_content(html: str, **_) -> str:
    """Remove Sphinx roles, which Markdown would show as text."""
    return ROLE.sub("", html)


def _mathml(match: re.Match) -> str:
    if match[1]:
        return convert(match[1], display="block")
    # The span keeps Markdown from reading a line that begins with <math> as a block.
    return f"<span>{convert(match[2])}</span>"
