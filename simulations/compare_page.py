"""How a comparison is shown: a table for the terminal, and a page with two pictures that opens offline."""

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from rich.table import Table
from rich.text import Text

from server.report import words
from server.report.drawing import (
    COLOURS,
    PAPER,
    STYLE,
    Label,
    Picture,
    canvas,
    inline,
    label_right,
)
from server.report.page import ENVIRONMENT
from server.report.template import whole_page
from simulations.baselines.registry import METHODS
from simulations.comparison import Comparison, Row

_MARKERS = ("o", "s", "^", "v", "D", "P", "X", "<", ">", "*", "h", "p", "d", "8", "H", (4, 1, 0))
"""By place in the table of methods, so that a method looks alike in every comparison."""
_HEIGHT = 5.0
"""Inches."""


# ---- Table -------------------------------------------------------------------------------------------------


def comparison_table(comparison: Comparison) -> Table:
    """Return one row per method and one column per ε, with what a site uploads."""
    table = Table(
        title=Text(_title(comparison)),
        caption=Text(_terms(comparison)),
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        caption_style="",
    )
    table.add_column("", min_width=16)
    for epsilon in comparison.question.epsilons:
        table.add_column(f"ε = {epsilon:g}", justify="right", no_wrap=True)
    table.add_column("up a round, in all", justify="right", min_width=9)
    for rows in _by_method(comparison):
        style = "bold" if rows[0].method == "federation" else ""
        sizes = ", ".join(dict.fromkeys(_sizes(rows)))
        table.add_row(*map(Text, [rows[0].label, *_scores(comparison, rows), sizes]), style=style)
    return table


def _by_method(comparison: Comparison) -> list[list[Row]]:
    return [rows for name in comparison.question.methods if (rows := list(comparison.of(name)))]


def _scores(comparison: Comparison, rows: Sequence[Row]) -> list[str]:
    """One score per ε; what doesn't depend on it is the same everywhere."""
    shown = [words.score(row.metrics[comparison.headline_metric]) for row in rows]
    return shown if rows[0].epsilon is not None else shown * len(comparison.question.epsilons)


def _sizes(rows: Sequence[Row]) -> list[str]:
    return [
        _span([row.bytes_up_per_round for row in rows]),
        _span([row.bytes_up for row in rows]),
    ]


def _span(sizes: Sequence[float]) -> str:
    low, high = (words.size(end(sizes)) for end in (min, max))
    return "–" if not max(sizes) else low if low == high else f"{low} to {high}"


def _title(comparison: Comparison) -> str:
    seeds, name = len(comparison.question.seeds), words.metric_name(comparison.headline_metric)
    spread = f", mean ± standard deviation of {seeds} seeds" if seeds > 1 else ""
    return f"{words.plain(comparison.question.scenario)}: {name} × 100{spread}"


def _terms(comparison: Comparison) -> str:
    """Say what every ε means, and how bytes are counted."""
    paid = [row.paid for row in comparison.rows if row.paid]
    terms = {
        f"δ = {words.delta(one.delta)}, {words.UNITS[one.unit]}, {words.ADJACENCIES[one.adjacency]}, "
        f"{words.HORIZONS[one.horizon]}, at each site"
        for one in paid
    }
    accountants = {words.ACCOUNTANTS.get(one.accountant, one.accountant) for one in paid}
    said = [*sorted(terms), f"by {' and '.join(sorted(accountants))}"] if paid else []
    return "; ".join([*said, "bytes without the transport's envelopes"])


# ---- Pictures ----------------------------------------------------------------------------------------------


def epsilon_picture(comparison: Comparison) -> Picture:
    """Draw each method's score against ε; what doesn't depend on it is a dashed line."""
    epsilons = sorted(comparison.question.epsilons)
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(_HEIGHT, left=0.07, right=0.68)
        low, hidden = _score_axis(axes, comparison)
        labels = []
        for rows in _by_method(comparison):
            rows, colour = sorted(rows, key=lambda row: row.epsilon or 0), COLOURS[rows[0].kind]
            heights = [100 * row.metrics[comparison.headline_metric].mean for row in rows]
            if rows[0].label in hidden:
                continue
            if rows[0].epsilon is None:
                axes.axhline(heights[0], color=colour, linewidth=1.0, linestyle=(0, (5, 3)))
            else:
                places = [row.epsilon or 0.0 for row in rows]
                axes.plot(places, heights, **_line(rows[0]))
            labels.append(Label(rows[0].label, max(heights[-1], low), colour, _weight(rows[0])))
        axes.set_xscale("log")
        if len(epsilons) == 1:
            axes.set_xlim(epsilons[0] / 2, epsilons[0] * 2)
        axes.xaxis.set_major_locator(FixedLocator(epsilons))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([f"{epsilon:g}" for epsilon in epsilons])
        axes.set_xlabel("ε")
        label_right(axes, labels, least=0.048)
        svg = inline(figure, "epsilon")
    return Picture(svg, _told(comparison), bool(hidden))


def bytes_picture(comparison: Comparison) -> Picture | None:
    """Draw each method's score against all that a site uploads, ε by ε; None where nobody sends anything."""
    senders = [rows for rows in _by_method(comparison) if any(row.bytes_up for row in rows)]
    if not senders:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(_HEIGHT, left=0.07, right=0.68)
        _, hidden = _score_axis(axes, comparison)
        for rows in senders:
            if rows[0].label in hidden:
                continue
            heights = [100 * row.metrics[comparison.headline_metric].mean for row in rows]
            axes.plot([row.bytes_up for row in rows], heights, label=rows[0].label, **_line(rows[0]))
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: words.size(count)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("bytes that a site uploads in the whole run")
        axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, labelspacing=0.9)
        svg = inline(figure, "bytes")
    told = "; ".join(f"{rows[0].label} {_span([row.bytes_up for row in rows])}" for rows in senders)
    return Picture(svg, f"Score against all bytes that a site uploads. {told}.", bool(hidden))


def _score_axis(axes: Axes, comparison: Comparison) -> tuple[float, set[str]]:
    """Set the range of scores; sites alone don't choose it, and who lies below is left out.

    Returns:
        The lowest score shown, and the labels of those left out.
    """
    means = [(row, 100 * row.metrics[comparison.headline_metric].mean) for row in comparison.rows]
    chosen = [mean for row, mean in means if row.kind != "sites"] or [mean for _, mean in means]
    pad = max(0.08 * (max(chosen) - min(chosen)), 0.3)
    low, high = min(chosen) - pad, max(chosen) + pad
    axes.set_ylim(low, high)
    axes.set_ylabel(f"{words.metric_name(comparison.headline_metric)} × 100")
    axes.grid(axis="y")
    return low, {row.label for row, mean in means if mean < low}


def _line(row: Row) -> dict[str, Any]:
    return {
        "color": COLOURS[row.kind],
        "marker": _MARKERS[list(METHODS).index(row.method) % len(_MARKERS)],
        "markersize": 9.0 if row.method == "federation" else 7.0,
        "markeredgecolor": PAPER,
        "markeredgewidth": 0.5,
        "linewidth": 2.4 if row.method == "federation" else 1.2,
    }


def _weight(row: Row) -> str:
    return "bold" if row.method == "federation" else "normal"


def _told(comparison: Comparison) -> str:
    """The first picture in words."""
    rows = [f"{rows[0].label} {', '.join(_scores(comparison, rows))}" for rows in _by_method(comparison)]
    epsilons = ", ".join(f"{epsilon:g}" for epsilon in comparison.question.epsilons)
    return f"{_title(comparison)}, at ε = {epsilons}. {'; '.join(rows)}."


# ---- Page --------------------------------------------------------------------------------------------------

_BODY = """
<main>
<header>
<p class="eyebrow">Grand Rounds comparison · scenario {{ question.scenario|plain }} · simulation ·
{{ comparison.finished.day }} {{ comparison.finished.strftime('%B %Y') }}</p>
<h1>What the federation is held against</h1>
<p>Every method saw the same cases, started from the same public teacher where it allows a start, trained the
same student by the same private step, and spent the same privacy budget at each site. Scores are on public
test cases that no model was trained on.</p>
</header>

<section>
<h2>Scores and bytes</h2>
<div class="scroll"><table class="scores">
<caption>{{ title }}; {{ terms }}</caption>
<thead><tr><th scope="col">Method</th>
{% for epsilon in question.epsilons %}<th scope="col" class="n">ε = {{ '%g' % epsilon }}</th>{% endfor %}
<th scope="col" class="n">A site sends a round</th><th scope="col" class="n">in all</th></tr></thead>
<tbody>
{% for one in shown %}
<tr{% if one.rows[0].method == 'federation' %} class="federation"{% endif %}>
<th scope="row"><span class="key k-{{ one.rows[0].kind }}"></span>{{ one.rows[0].label }}
{% if one.rows[0].paper %}<span class="meaning">{{ one.rows[0].paper }}</span>{% endif %}</th>
{% for value in one.scores + one.sizes %}<td class="n">{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% if comparison.not_computable %}
<p class="note">Not computable in this run: {{ comparison.not_computable|join(', ') }}.</p>
{% endif %}
</section>

<section>
<h2>Score against ε</h2>
<figure><div class="picture" role="img" aria-label="{{ by_epsilon.alt }}">{{ by_epsilon.svg }}</div>
<figcaption>Means over the seeds; their spread stands in the table. Dashed: what doesn't depend on ε.
{% if by_epsilon.off_scale %}Sites alone lie below the axis.{% endif %}</figcaption></figure>
</section>
{% if by_bytes %}
<section>
<h2>Score against bytes</h2>
<figure><div class="picture" role="img" aria-label="{{ by_bytes.alt }}">{{ by_bytes.svg }}</div>
<figcaption>One marker for each ε, joined from the smallest to the largest.</figcaption></figure>
</section>
{% endif %}

<section>
<h2>Details</h2>
<details><summary>What each method sends, and what it changes in the run</summary>
<div class="scroll"><table>
<thead><tr><th scope="col">Method</th><th scope="col">ε</th><th scope="col">Up and down</th>
<th scope="col">Settings</th></tr></thead><tbody>
{% for row in comparison.rows %}
<tr><th scope="row">{{ row.label }}</th><td>{{ '%g' % row.epsilon if row.epsilon else '–' }}</td>
<td>{{ sends[row.method] }}{% if row.rounds %}: {{ row.bytes_up_per_round|size }} up,
{{ row.bytes_down_per_round|size }} down, {{ row.rounds|counted('round') }}{% endif %}</td>
<td>{% for key, value in row.settings.items() %}<code>{{ key }}={{ value }}</code>
{% else %}as the run{% endfor %}</td></tr>
{% endfor %}
</tbody></table></div></details>
<details><summary>Run configuration</summary>
<div class="scroll"><table><thead><tr><th scope="col">Key</th><th scope="col">Value</th></tr></thead><tbody>
{% for name, value in question.run_config.items() %}
<tr><th scope="row"><code>{{ name }}</code></th><td><code>{{ value|string|plain(300) }}</code></td></tr>
{% endfor %}
</tbody></table></div></details>
</section>
</main>
"""
_PAGE = whole_page("Grand Rounds comparison: {{ question.scenario|plain }}", _BODY)


def render(comparison: Comparison) -> str:
    """Return the comparison as a page of its own, to be written as UTF-8."""
    shown = [
        {"rows": rows, "scores": _scores(comparison, rows), "sizes": _sizes(rows)}
        for rows in _by_method(comparison)
    ]
    return ENVIRONMENT.from_string(_PAGE).render(
        comparison=comparison,
        question=comparison.question,
        title=_title(comparison),
        terms=_terms(comparison),
        shown=shown,
        sends={name: method.sends for name, method in METHODS.items()},
        by_epsilon=epsilon_picture(comparison),
        by_bytes=bytes_picture(comparison),
    )
