"""The result of a run as a table for the terminal."""

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from common.summary import SitePrivacy, Summary
from server.report import words
from server.report.verdict import lines


def results_table(summary: Summary) -> Table:
    """Return one row per contender and one column per metric, with the privacy that it cost below.

    Nothing in it is markup: a site may be called `[red]`.
    """
    metrics = list(summary.results.federation)
    table = Table(
        title=Text(_title(summary)),
        title_justify="left",
        caption=_privacy(summary.privacy),
        caption_justify="left",
        title_style="bold",
        caption_style="",
    )
    table.add_column(Text("score × 100"))
    for metric in metrics:
        table.add_column(Text(words.metric_name(metric)), justify="right", no_wrap=True)
    for line in lines(summary):
        style = "bold" if line.is_federation else "dim" if line.is_single_site or line.metrics is None else ""
        name = f"  {line.name}" if line.is_single_site else line.name
        scored = line.metrics or {}
        cells = [words.score(scored[metric]) if metric in scored else "–" for metric in metrics]
        table.add_row(Text(name), *map(Text, cells), style=style)
    return table


def _title(summary: Summary) -> str:
    seeds = len(summary.seeds)
    spread = f", mean ± standard deviation of {seeds} seeds" if seeds > 1 else ""
    sites = words.counted(len(summary.sites), "site")
    rounds = words.rounds_held(summary.rounds, summary.rounds_planned)
    return f"{words.plain(summary.scenario)}: {sites}, {rounds}{spread}"


def _privacy(privacy: Iterable[SitePrivacy]) -> Text:
    """Write one line for all sites that paid the same on the same terms."""
    sites: dict[str, list[str]] = {}
    for line in privacy:
        sites.setdefault(words.guarantee(line), []).append(line.site)
    return Text("\n".join(f"{words.names(alike)}: {paid}" for paid, alike in sites.items()))
