"""The report of a run: one HTML page that opens offline and that a physician can read.

The page carries everything inside itself (styles, pictures, no script) and forbids the browser to fetch
anything. What it says comes from the summary alone: `server.report.verdict` writes the words,
`server.report.figures` draws, `server.report.template` holds the page, and this module prepares what the
page shows. Names of sites and reasons came from elsewhere; the template engine escapes every string, so
they can be shown and do nothing.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import jinja2

from common.summary import Bytes, Round, SitePrivacy, Summary
from server.report import words
from server.report.figures import contenders_picture, rounds_picture
from server.report.template import PAGE
from server.report.verdict import Line, best_site, compare, lines, public_start, verdict

_MOST_ABSENCES = 60
_REASON_LENGTH = 300


@dataclass(frozen=True)
class Tile:
    """A number that the eye should find first."""

    value: str
    name: str
    note: str


@dataclass(frozen=True)
class ScoreRow:
    """A contender's row in the table of scores.

    Args:
        line: The contender.
        scores: One per metric of the federation; empty where it was not computed.
        gap: How far the federation is above it in the headline metric, and in how many repetitions.
    """

    line: Line
    scores: tuple[str, ...]
    gap: str


@dataclass(frozen=True)
class Attendance:
    """How often one site took part."""

    site: str
    declared_size: str
    answered: str


@dataclass(frozen=True)
class Absence:
    """When and why rounds did without a site."""

    site: str
    reason: str
    when: str


def render(summary: Summary) -> str:
    """Return the report as a page of its own, to be written as UTF-8.

    Args:
        summary: One run, or several that differ in their seeds (`common.summary.merge`).
    """
    absences = _absences(summary.history)
    metrics = list(summary.results.federation)
    return ENVIRONMENT.from_string(PAGE).render(
        summary=summary,
        seeds=len(summary.seeds),
        facts=_facts(summary),
        verdict=verdict(summary),
        tiles=_tiles(summary),
        metrics=metrics,
        meanings=[words.metric_meaning(metric, len(summary.classes)) for metric in metrics],
        contenders=contenders_picture(summary),
        score_rows=[_score_row(line, summary) for line in lines(summary)],
        rounds=rounds_picture(summary),
        costliest=_costliest(summary),
        guarantees=_guarantees(summary.privacy),
        with_noise=any(line.noise_multiplier is not None for line in summary.privacy),
        traffic=_traffic(summary),
        attendance=_attendance(summary),
        absences=absences[:_MOST_ABSENCES],
        more_absences=max(len(absences) - _MOST_ABSENCES, 0),
        provenance=_provenance(summary),
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "plain": words.plain,
        "counted": words.counted,
        "metric_name": words.metric_name,
        "size": words.size,
        "duration": words.duration,
        "at_most": words.at_most,
        "delta": words.delta,
        "recognised": words.recognised,
        "accountant": words.accountant,
        "unit": words.UNITS.__getitem__,
        "adjacency": words.ADJACENCIES.__getitem__,
        "horizon": words.HORIZONS.__getitem__,
    }
    return environment


ENVIRONMENT = _environment()
"""What fills a page in: every value escaped, numbers and names in the words of `words`."""


def _facts(summary: Summary) -> list[str]:
    """Say in a few words what this is a report of."""
    facts = ["Grand Rounds report", f"scenario {words.plain(summary.scenario)}"]
    if summary.method:
        facts.append(f"method {words.plain(summary.method)}")
    if len(summary.seeds) > 1:
        facts.append(words.counted(len(summary.seeds), "repetition"))
    if summary.simulated:
        facts.append("simulation")
    if summary.finished:
        facts.append(f"{summary.finished.day} {summary.finished:%B %Y}")
    return facts


def _tiles(summary: Summary) -> list[Tile]:
    """Choose the numbers that the eye should find first."""
    metric = summary.headline_metric
    name, ours = words.metric_name(metric), summary.results.federation[metric]
    tiles = [Tile(words.score(ours), f"{name} × 100", "of the federation, on public test cases")]
    for against, other in (
        ("public data", public_start(summary)),
        ("the best site", best_site(summary)),
    ):
        if other is not None:
            gap = words.signed(compare(ours, other[1]).difference)
            tiles.append(Tile(gap, f"points against {against}", other[0]))
    costliest = _costliest(summary)
    if costliest is not None:
        terms = f"δ = {words.delta(costliest.delta)}, {words.HORIZONS[costliest.horizon]}"
        tiles.append(
            Tile(f"ε = {words.at_most(costliest.epsilon)}", f"privacy loss per {costliest.unit}", terms)
        )
    sent = summary.bytes_up_per_site_per_round.mean
    tiles.append(
        Tile(words.size(sent), "sent in a round", f"by each site; {words.size(sent * summary.rounds)} in all")
    )
    return tiles


def _costliest(summary: Summary) -> SitePrivacy | None:
    return max(summary.privacy, key=lambda line: line.epsilon, default=None)


def _score_row(line: Line, summary: Summary) -> ScoreRow:
    metrics, headline = line.metrics, summary.headline_metric
    if metrics is None:
        return ScoreRow(line, (), "")
    scores = tuple(
        words.score(metrics[name]) if name in metrics else "–" for name in summary.results.federation
    )
    if line.is_federation or headline not in metrics:
        return ScoreRow(line, scores, "")
    comparison = compare(summary.results.federation[headline], metrics[headline])
    gap = words.signed(comparison.difference)
    if comparison.seeds > 1 and gap != "0.0":
        gap += f" ({comparison.agreeing} of {comparison.seeds})"
    return ScoreRow(line, scores, gap)


def _guarantees(privacy: Iterable[SitePrivacy]) -> list[tuple[str, str]]:
    """Write a sentence for every guarantee that differs, with the sites that have it."""
    sites: dict[str, list[str]] = {}
    for line in privacy:
        sites.setdefault(words.guarantee_in_full(line), []).append(line.site)
    return [(words.names(alike), sentence) for sentence, alike in sites.items()]


def _traffic(summary: Summary) -> list[tuple[str, Bytes]]:
    traffic = [("Encoded answers", summary.bytes_up_per_site_per_round)]
    if summary.wire_bytes_up_per_site_per_round is not None:
        traffic.append(("Whole message, with its envelope", summary.wire_bytes_up_per_site_per_round))
    return traffic


def _attendance(summary: Summary) -> list[Attendance]:
    answered = Counter(site for row in summary.history for site in row.answered)
    expected = sum(row.round > 0 for row in summary.history)
    return [
        Attendance(
            words.plain(site),
            f"{summary.declared_sizes[site]:,}" if site in summary.declared_sizes else "not declared",
            f"{answered[site]} of {expected}" if expected else "not recorded",
        )
        for site in summary.sites
    ]


def _absences(history: Iterable[Round]) -> list[Absence]:
    """Gather absences by site and reason: one broken site is one row, not one a round."""
    rounds: dict[tuple[str, str], dict[int, list[int]]] = {}
    for row in history:
        for left in row.left_out:
            by_seed = rounds.setdefault((left.site, left.reason), {})
            by_seed.setdefault(row.seed, []).append(row.round)
    return [
        Absence(words.plain(site), words.plain(reason, _REASON_LENGTH), _when(by_seed))
        for (site, reason), by_seed in rounds.items()
    ]


def _when(by_seed: Mapping[int, Sequence[int]]) -> str:
    """Spell out rounds, once for all seeds to which the same happened."""
    alike: dict[str, list[int]] = {}
    for seed, rounds in by_seed.items():
        alike.setdefault(words.numbers(rounds), []).append(seed)
    return "; ".join(
        f"{rounds} (seed{'s' * (len(seeds) > 1)} {words.numbers(seeds)})" for rounds, seeds in alike.items()
    )


def _provenance(summary: Summary) -> list[tuple[str, str]]:
    digests = zip(summary.seeds, summary.proxy_digests, strict=False)
    found = [
        ("Run", summary.run_id),
        ("Finished", summary.finished and summary.finished.isoformat(timespec="seconds")),
        ("Backend", summary.backend),
        ("Classes", ", ".join(summary.classes)),
        *((f"SHA-256 of the proxy, seed {seed}", digest) for seed, digest in digests),
        *((f"Version of {words.plain(name)}", version) for name, version in summary.versions.items()),
    ]
    return [(name, value) for name, value in found if value]
