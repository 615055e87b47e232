"""The two pictures of a report, as SVG to be placed inside the page.

Matplotlib draws; `_inline` then turns its file into a part of the page: text stays text in the page's own
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

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.markers import CARETLEFT
from matplotlib.ticker import MaxNLocator

from common.summary import Metrics, Statistic, Summary
from server.report.verdict import Kind, Line, lines
from server.report.words import at_most, metric_name, plain, score

# Stand-ins that matplotlib writes into its file and `_inline` replaces by the page's variables. Never pure
# black: matplotlib leaves that out of the file.
_INK, _MUTED, _GRID, _PAPER = "#010001", "#010002", "#010003", "#010004"
_COLOURS: Mapping[Kind, str] = {
    "public": "#010011",
    "sites": "#010012",
    "federation": "#010013",
    "pooled": "#010014",
}
_VARIABLES = {
    _INK: "--ink",
    _MUTED: "--muted",
    _GRID: "--line",
    _PAPER: "--paper",
    **{colour: f"--{kind}" for kind, colour in _COLOURS.items()},
}
_MARKERS: Mapping[Kind, str] = {"public": "s", "sites": "^", "federation": "o", "pooled": "D"}
# What the federation is held against round by round, and with what kind of line.
_DASHES: Mapping[Kind, Any] = {"public": (0, (6, 2)), "pooled": (0, (2, 2))}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text as text: it can be read aloud, searched and copied
    "svg.hashsalt": "report",  # the same summary gives the same bytes
    "font.size": 9.5,
    "text.parse_math": False,  # a site may be called `$x$`
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.facecolor": "none",
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "figure.facecolor": "none",
}

_WIDTH = 8.6
"""Inches; the page scales a picture to its column."""
_MOST_SITES = 12
"""With more sites than this each is a stroke in one row instead of a row."""
_LABEL_LENGTH = 34


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


@dataclass(frozen=True)
class _Shown:
    """A contender with its headline score."""

    line: Line
    score: Statistic


def _shown(summary: Summary) -> list[_Shown]:
    found = []
    for line in lines(summary):
        metrics: Metrics = line.metrics or {}
        if summary.headline_metric in metrics:
            found.append(_Shown(line, metrics[summary.headline_metric]))
    return found


def contenders_picture(summary: Summary) -> Picture:
    """Draw the headline score of every contender: mean, spread over seeds, and each seed."""
    shown = _shown(summary)
    singles = [one for one in shown if one.line.is_single_site]
    crowded = len(singles) > _MOST_SITES
    rows = [one for one in shown if not (crowded and one.line.is_single_site)]
    name = metric_name(summary.headline_metric)
    # Single sites don't choose the axis: one hopeless site must not flatten the rest.
    low, high = _range_of([one.score for one in shown if not one.line.is_single_site])

    with matplotlib.rc_context(_STYLE):
        figure, axes = _canvas(0.6 + 0.31 * len(rows), left=0.3, right=0.88)
        axes.set_xlim(low, high)
        axes.set_ylim(len(rows) - 0.45, -0.6)
        axes.set_yticks([])
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
        axes.set_xlabel(f"{name} × 100 on public test cases")
        axes.grid(axis="x")
        federation = 100 * summary.results.federation[summary.headline_metric].mean
        axes.axvline(federation, color=_COLOURS["federation"], linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        for place, one in enumerate(rows):
            _draw_score(axes, place, one, low)
            _label_row(axes, place, one)
            if crowded and one.line.kind == "sites":
                means = [max(100 * single.score.mean, low) for single in singles]
                axes.plot(means, [place] * len(means), "|", color=_COLOURS["sites"], markersize=11, alpha=0.6)
            if place and rows[place - 1].line.kind != one.line.kind:
                axes.axhline(place - 0.5, color=_GRID, linewidth=0.8, zorder=0)
        svg = _inline(figure, "contenders")

    told = "; ".join(f"{one.line.name} {score(one.score)}" for one in shown)
    off_scale = any(100 * one.score.mean < low for one in shown)
    return Picture(svg, f"{name} times 100 of every contender. {told}.", off_scale)


def rounds_picture(summary: Summary) -> Picture | None:
    """Draw the headline score round by round, above the ε spent by then; None without a history."""
    name = metric_name(summary.headline_metric)
    scores: dict[int, list[float]] = {}
    spent: dict[int, float] = {}
    for row in sorted(summary.history, key=lambda row: row.round):
        if summary.headline_metric in row.metrics:
            scores.setdefault(row.round, []).append(100 * row.metrics[summary.headline_metric])
        if row.epsilon_spent is not None:
            spent[row.round] = max(row.epsilon_spent, spent.get(row.round, 0.0))
    if len(scores) < 2:
        return None
    rounds = list(scores)
    means = [sum(values) / len(values) for values in scores.values()]
    references = [one for one in _shown(summary) if one.line.kind in _DASHES]

    with matplotlib.rc_context(_STYLE):
        figure, axes = _canvas(4.4 if spent else 3.1, left=0.075, right=0.7, panels=2 if spent else 1)
        _draw_rounds(axes, scores, means, references)
        axes.set_ylabel(f"{name} × 100")
        if spent:
            axes.tick_params(labelbottom=False)
            _draw_spent(figure.axes[1], spent)
        for panel in figure.axes:
            panel.set_xlim(rounds[0], rounds[-1])
            panel.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
            panel.grid(axis="y")
        figure.axes[-1].set_xlabel("round")
        svg = _inline(figure, "rounds")

    alt = (
        f"{name} times 100 of the federation, from {means[0]:.1f} at round {rounds[0]} "
        f"to {means[-1]:.1f} at round {rounds[-1]}."
    )
    if references:
        alt += " Beside it: " + "; ".join(f"{one.line.name} {score(one.score)}" for one in references) + "."
    if spent:
        alt += f" ε spent rises to {at_most(max(spent.values()))}."
    return Picture(svg, alt)


def _range_of(scores: Sequence[Statistic]) -> tuple[float, float]:
    ends = [100 * end for one in scores for end in (*one.values, one.mean - one.std, one.mean + one.std)]
    pad = max(0.07 * (max(ends) - min(ends)), 0.5)
    return max(min(ends) - pad, 0.0), min(max(ends) + pad, 100.5)


def _draw_score(axes: Axes, place: int, one: _Shown, low: float) -> None:
    colour, mean, reach = _COLOURS[one.line.kind], 100 * one.score.mean, 100 * one.score.std
    if mean < low:
        axes.plot(low, place, marker=CARETLEFT, color=colour, markersize=8, clip_on=False)
        return
    if len(one.score.values) > 1:
        axes.hlines(place, mean - reach, mean + reach, color=colour, linewidth=1.8, alpha=0.75, zorder=2)
        seeds = [100 * value for value in one.score.values]
        dots: dict[str, Any] = {"marker": "o", "markersize": 3.2, "markeredgewidth": 0, "alpha": 0.45}
        axes.plot(seeds, [place] * len(seeds), linestyle="none", color=colour, zorder=3, **dots)
    axes.plot(
        mean,
        place,
        marker=_MARKERS[one.line.kind],
        markersize=9.0 if one.line.is_federation else 5.5 if one.line.is_single_site else 7.0,
        markerfacecolor=colour,
        markeredgecolor=_PAPER,
        zorder=4,
    )


def _label_row(axes: Axes, place: int, one: _Shown) -> None:
    """Write a contender's name to the left of its row and its score to the right."""
    manner: dict[str, Any] = {
        "transform": axes.get_yaxis_transform(),
        "verticalalignment": "center",
        "fontweight": "bold" if one.line.is_federation else "normal",
        "color": _MUTED if one.line.is_single_site else _INK,
    }
    name = plain(one.line.name, _LABEL_LENGTH)
    name = f"Alone: {name}" if one.line.is_single_site else name
    axes.text(-0.015, place, name, horizontalalignment="right", **manner)
    axes.text(1.015, place, score(one.score), **manner)


def _draw_rounds(
    axes: Axes, scores: Mapping[int, Sequence[float]], means: Sequence[float], references: Sequence[_Shown]
) -> None:
    rounds, colour = list(scores), _COLOURS["federation"]
    lowest, highest = list(map(min, scores.values())), list(map(max, scores.values()))
    levels = [100 * one.score.mean for one in references]
    pad = max(0.06 * (max(highest + levels) - min(lowest + levels)), 0.3)
    axes.set_ylim(min(lowest + levels) - pad, max(highest + levels) + pad)
    axes.fill_between(rounds, lowest, highest, color=colour, alpha=0.18, linewidth=0)
    labels = [_Label("Federation", means[-1], colour, "bold")]
    for one, level in zip(references, levels, strict=True):
        kind = one.line.kind
        axes.axhline(level, color=_COLOURS[kind], linewidth=1.1, linestyle=_DASHES[kind])
        labels.append(_Label(one.line.name, level, _COLOURS[kind]))
    axes.plot(rounds, means, color=colour, linewidth=2.2)
    _label_right(axes, labels)


def _draw_spent(axes: Axes, spent: Mapping[int, float]) -> None:
    most = max(spent.values())
    axes.set_ylim(0, 1.15 * most or 1.0)
    axes.plot(list(spent), list(spent.values()), color=_INK, linewidth=1.6)
    axes.set_ylabel("ε spent")
    _label_right(axes, [_Label(f"ε = {at_most(most)}", most, _INK)])


def _canvas(height: float, left: float, right: float, panels: int = 1) -> tuple[Figure, Axes]:
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
class _Label:
    text: str
    height: float
    colour: str
    weight: str = "normal"


def _label_right(axes: Axes, labels: Sequence[_Label]) -> None:
    """Write labels to the right of the axes, pushed apart, each tied to its height by a line."""
    low, high = axes.get_ylim()
    labels = sorted(labels, key=lambda label: label.height)
    places = _apart([label.height for label in labels], 0.07 * (high - low))
    beside = axes.get_yaxis_transform()
    for label, place in zip(labels, places, strict=True):
        tie: dict[str, Any] = {"transform": beside, "color": label.colour, "linewidth": 0.8, "clip_on": False}
        axes.plot([1.003, 1.02], [label.height, place], **tie)
        manner: dict[str, Any] = {"color": label.colour, "fontweight": label.weight}
        axes.text(1.026, place, label.text, transform=beside, verticalalignment="center", **manner)


def _apart(heights: Sequence[float], distance: float) -> list[float]:
    """Move sorted heights as little as needs be until neighbours are a distance apart.

    Heights that collide become a block around their common mean; blocks that then collide are joined.
    """

    def lowest(block: Sequence[float]) -> float:
        return sum(block) / len(block) - distance * (len(block) - 1) / 2

    def highest(block: Sequence[float]) -> float:
        return lowest(block) + distance * (len(block) - 1)

    blocks: list[list[float]] = []
    for height in heights:
        blocks.append([height])
        while len(blocks) > 1 and lowest(blocks[-1]) - highest(blocks[-2]) < distance:
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return [lowest(block) + distance * place for block in blocks for place in range(len(block))]


def _inline(figure: Figure, prefix: str) -> Markup:
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
