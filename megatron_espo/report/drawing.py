"""Pictures that follow the page's colours: matplotlib's SVG with its colours replaced by CSS variables, and the same as PNG."""

import html
import io
import re
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

# The light palette; each colour stands for the CSS variable of its name, which has a dark value too. Distinct for readers who
# confuse red and green (after Okabe and Ito, darkened for white ground).
COLORS = ("#0b6fb8", "#d1560b", "#0a8f6c", "#b8467f", "#7a6a00", "#3aa0c9", "#6b4fc4", "#8a8f98")
INK, MUTED, GRID = "#1d2433", "#5a6475", "#dfe3ea"
VARIABLES = {color: f"var(--c{i})" for i, color in enumerate(COLORS)} | {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"}
SIZE = (5.2, 3.0)  # inches
MOST_POINTS = 400
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron_espo",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 5),
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@dataclass(frozen=True)
class Picture:
    """One chart.

    Attributes:
        name: file name without ending.
        title: what it shows.
        svg: ``<svg>`` element without size of its own, in the page's colours.
        png: the same for the light theme, transparent ground made white.
    """

    name: str
    title: str
    svg: str
    png: bytes


class Canvas:
    """A figure with one set of axes in the report's style; ``finish`` makes the :class:`Picture`."""

    def __init__(self, name: str, title: str, *, height: float = SIZE[1]) -> None:
        self.name, self.title = name, title
        with rc_context(_STYLE):
            self._figure = Figure(figsize=(SIZE[0], height), layout="constrained")
            self.axes: Axes = self._figure.subplots()
            self.axes.set_title(title)

    def legend(self, *, below: bool = False, dashes: dict[str, str] | None = None) -> None:
        """Name the curves inside the axes, or in one row ``below`` the picture; or, where colours stand for runs, name the ``dashes``."""
        handles, labels = self.axes.get_legend_handles_labels()
        if dashes:
            handles, labels = [Line2D([], [], color=MUTED, linestyle=style) for style in dashes.values()], list(dashes)
        with rc_context(_STYLE):
            if below:
                self._figure.legend(handles, labels, loc="outside lower center", ncols=5)
            else:
                self.axes.legend(handles, labels)

    def finish(self, *, integer_steps: bool = True) -> Picture:
        """Both forms of the picture."""
        if integer_steps:
            self.axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        svg, png = io.StringIO(), io.BytesIO()
        with rc_context(_STYLE):
            self._figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
            self._figure.savefig(png, format="png", dpi=110, facecolor="white")
        return Picture(self.name, self.title, _themed(svg.getvalue(), self.name, self.title), png.getvalue())


def _themed(svg: str, name: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, variable)
    # Several pictures are in one document: ids must differ.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'<svg (?:height|width)="[^"]*" (?:height|width)="[^"]*"', "<svg", svg)
    svg = re.sub(r"<svg([^>]*)>", lambda m: f'<svg role="img" aria-label="{html.escape(title)}"{_without_size(m[1])}>', svg, count=1)
    return re.sub(r"\n\s*", "\n", svg)


def _without_size(attributes: str) -> str:
    return re.sub(r' (?:width|height)="[^"]*"', "", attributes)


def thin(steps: list[int], *columns: list[float]) -> tuple[list[float], ...]:
    """Means over equal stretches, so that long runs draw no more than ``MOST_POINTS`` points."""
    size = -(-len(steps) // MOST_POINTS)
    if size <= 1:
        return steps, *columns
    return tuple([sum(part) / len(part) for i in range(0, len(c), size) if (part := c[i : i + size])] for c in (steps, *columns))
