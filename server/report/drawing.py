"""How pictures are drawn for a page: canvas, colours, labels, and the way into the page as SVG.

Matplotlib draws; `inline` then turns its file into a part of the page: text stays text in the page's own
font, colours become the page's variables (so that one picture serves light, dark and paper), and all that
would point outside the page is taken out. Colours are after Okabe and Ito, told apart by the colour-blind,
and every kind of contender also has a marker of its own.
"""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from server.report.verdict import Kind

# Stand-ins that matplotlib writes into its file and `inline` replaces by the page's variables. Never pure
# black: matplotlib leaves that out of the file.
INK, MUTED, GRID, PAPER = "#010001", "#010002", "#010003", "#010004"
COLOURS: Mapping[Kind, str] = {
    "public": "#010011",
    "sites": "#010012",
    "baseline": "#010015",
    "federation": "#010013",
    "pooled": "#010014",
}
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--line",
    PAPER: "--paper",
    **{colour: f"--{kind}" for kind, colour in COLOURS.items()},
}
MARKERS: Mapping[Kind, str] = {"public": "s", "sites": "^", "baseline": "v", "federation": "o", "pooled": "D"}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text as text: it can be read aloud, searched and copied
    "svg.hashsalt": "report",  # the same summary gives the same bytes
    "font.size": 9.5,
    "text.parse_math": False,  # a site may be called `$x$`
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "figure.facecolor": "none",
}

_WIDTH = 8.6
"""Inches; the page scales a picture to its column."""


@dataclass(frozen=True)
class Picture:
    """An SVG element, and what it shows in words for those who can't see it.

    Args:
        svg: The element.
        alt: The words.
        off_scale: Whether a site lies beyond the axis and is shown by a triangle at its edge.
    """

    svg: Markup
    alt: str
    off_scale: bool = False


def canvas(height: float, left: float, right: float, panels: int = 1) -> tuple[Figure, Axes]:
    """Make a figure without pyplot: no global state, no window system.

    Args:
        height: Of the whole figure, in inches.
        left: Where the axes begin, as a share of the width; labels stand beside them.
        right: Where the axes end.
        panels: Axes one above the other; the first is the tallest.

    Returns:
        The figure and its first axes.
    """
    figure = Figure(figsize=(_WIDTH, height))
    figure.subplots_adjust(left, 0.45 / height, right, 1 - 0.1 / height, hspace=0.16)
    grid = figure.add_gridspec(panels, 1, height_ratios=[3.0, *[1.0] * (panels - 1)])
    for panel in range(panels):
        axes = figure.add_subplot(grid[panel])
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        axes.set_axisbelow(True)
    return figure, figure.axes[0]


@dataclass(frozen=True)
class Label:
    """Words at a height of the axes, in data units."""

    text: str
    height: float
    colour: str
    weight: str = "normal"


def label_right(axes: Axes, labels: Sequence[Label], least: float = 0.07) -> None:
    """Write labels to the right of the axes, pushed apart, each tied to its height by a line.

    Args:
        axes: Their heights are those of the labels.
        labels: What to write.
        least: Distance between two labels, as a share of the height of the axes.
    """
    low, high = axes.get_ylim()
    labels = sorted(labels, key=lambda label: label.height)
    places = _apart([label.height for label in labels], least * (high - low), low, high)
    beside = axes.get_yaxis_transform()
    for label, place in zip(labels, places, strict=True):
        tie: dict[str, Any] = {"transform": beside, "color": label.colour, "linewidth": 0.8, "clip_on": False}
        axes.plot([1.003, 1.02], [label.height, place], **tie)
        manner: dict[str, Any] = {"color": label.colour, "fontweight": label.weight}
        axes.text(1.026, place, label.text, transform=beside, verticalalignment="center", **manner)


def _apart(heights: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Move sorted heights as little as needs be until neighbours are a distance apart, from low to high.

    Heights that collide become a block around their common mean; blocks that then collide are joined. What
    is too many for the space goes beyond its lower end.
    """

    def lowest(block: Sequence[float]) -> float:
        reach = distance * (len(block) - 1)
        return min(max(sum(block) / len(block) - reach / 2, low), high - reach)

    def highest(block: Sequence[float]) -> float:
        return lowest(block) + distance * (len(block) - 1)

    blocks: list[list[float]] = []
    for height in heights:
        blocks.append([height])
        while len(blocks) > 1 and lowest(blocks[-1]) - highest(blocks[-2]) < distance:
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return [lowest(block) + distance * place for block in blocks for place in range(len(block))]


def inline(figure: Figure, prefix: str) -> Markup:
    """Turn a figure into an SVG element for the page.

    Args:
        figure: What to draw.
        prefix: Begins every id, for ids must be unique in the page.
    """
    file = io.StringIO()
    with warnings.catch_warnings():
        # A name may be in a script that the measuring font lacks; the reader's browser has fonts of its own.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    for outside_or_global in (r"<metadata>.*?</metadata>", r"<style.*?</style>", r"<!--.*?-->"):
        svg = re.sub(outside_or_global, "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", svg, count=1)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href="|url\()#', rf"\g<1>#{prefix}-", svg)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, f"var({variable})")
    return Markup(svg)  # matplotlib has escaped the names in it
