"""The two pictures of a report: every contender's score, and the rounds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.markers import CARETLEFT
from matplotlib.ticker import MaxNLocator

from common.summary import Metrics, Statistic, Summary
from server.report.drawing import (
    COLOURS,
    GRID,
    INK,
    MARKERS,
    MUTED,
    PAPER,
    STYLE,
    Label,
    Picture,
    canvas,
    inline,
    label_right,
)
from server.report.verdict import Kind, Line, lines
from server.report.words import at_most, metric_name, plain, score

# What the federation is held against round by round, and with what kind of line.
_DASHES: Mapping[Kind, Any] = {"public": (0, (6, 2)), "pooled": (0, (2, 2))}

_MOST_SITES = 12
"""With more sites than this each is a stroke in one row instead of a row."""
_LABEL_LENGTH = 34


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

    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(0.6 + 0.31 * len(rows), left=0.3, right=0.88)
        axes.set_xlim(low, high)
        axes.set_ylim(len(rows) - 0.45, -0.6)
        axes.set_yticks([])
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
        axes.set_xlabel(f"{name} × 100 on public test cases")
        axes.grid(axis="x")
        federation = 100 * summary.results.federation[summary.headline_metric].mean
        axes.axvline(federation, color=COLOURS["federation"], linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        for place, one in enumerate(rows):
            _draw_score(axes, place, one, low)
            _label_row(axes, place, one)
            if crowded and one.line.kind == "sites":
                means = [max(100 * single.score.mean, low) for single in singles]
                axes.plot(means, [place] * len(means), "|", color=COLOURS["sites"], markersize=11, alpha=0.6)
            if place and rows[place - 1].line.kind != one.line.kind:
                axes.axhline(place - 0.5, color=GRID, linewidth=0.8, zorder=0)
        svg = inline(figure, "contenders")

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

    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(4.4 if spent else 3.1, left=0.075, right=0.7, panels=2 if spent else 1)
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
        svg = inline(figure, "rounds")

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
    colour, mean, reach = COLOURS[one.line.kind], 100 * one.score.mean, 100 * one.score.std
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
        marker=MARKERS[one.line.kind],
        markersize=9.0 if one.line.is_federation else 5.5 if one.line.is_single_site else 7.0,
        markerfacecolor=colour,
        markeredgecolor=PAPER,
        zorder=4,
    )


def _label_row(axes: Axes, place: int, one: _Shown) -> None:
    """Write a contender's name to the left of its row and its score to the right."""
    manner: dict[str, Any] = {
        "transform": axes.get_yaxis_transform(),
        "verticalalignment": "center",
        "fontweight": "bold" if one.line.is_federation else "normal",
        "color": MUTED if one.line.is_single_site else INK,
    }
    name = plain(one.line.name, _LABEL_LENGTH)
    name = f"Alone: {name}" if one.line.is_single_site else name
    axes.text(-0.015, place, name, horizontalalignment="right", **manner)
    axes.text(1.015, place, score(one.score), **manner)


def _draw_rounds(
    axes: Axes, scores: Mapping[int, Sequence[float]], means: Sequence[float], references: Sequence[_Shown]
) -> None:
    rounds, colour = list(scores), COLOURS["federation"]
    lowest, highest = list(map(min, scores.values())), list(map(max, scores.values()))
    levels = [100 * one.score.mean for one in references]
    pad = max(0.06 * (max(highest + levels) - min(lowest + levels)), 0.3)
    axes.set_ylim(min(lowest + levels) - pad, max(highest + levels) + pad)
    axes.fill_between(rounds, lowest, highest, color=colour, alpha=0.18, linewidth=0)
    labels = [Label("Federation", means[-1], colour, "bold")]
    for one, level in zip(references, levels, strict=True):
        kind = one.line.kind
        axes.axhline(level, color=COLOURS[kind], linewidth=1.1, linestyle=_DASHES[kind])
        labels.append(Label(one.line.name, level, COLOURS[kind]))
    axes.plot(rounds, means, color=colour, linewidth=2.2)
    label_right(axes, labels)


def _draw_spent(axes: Axes, spent: Mapping[int, float]) -> None:
    most = max(spent.values())
    axes.set_ylim(0, 1.15 * most or 1.0)
    axes.plot(list(spent), list(spent.values()), color=INK, linewidth=1.6)
    axes.set_ylabel("ε spent")
    label_right(axes, [Label(f"ε = {at_most(most)}", most, INK)])
