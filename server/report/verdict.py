"""Was it worth it? The contenders of a summary, compared, and a verdict in plain words.

The verdict is written by rule from the numbers, so that a federation that gained nothing reads like one. It
looks at one metric, the summary's headline, and asks three things: what did the federation gain over what
public data alone gave, what over the best site alone, and would labelling the public cases have done as
well?

Contenders are compared seed by seed, on the same splits. A difference is *clear* if a paired t-test calls
it so at 5 %. The splits of one data set overlap, so that is a generous test: what fails it is surely not
clear. With a single seed there is nothing to test; then a difference of less than a point counts for
nothing, and the verdict says that a larger one may be chance, too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from common.summary import Metrics, Statistic, Summary
from server.report.words import SMALLEST_SHOWN, counted, metric_name, plain, points, rounds_held, score

Kind = Literal["public", "sites", "baseline", "federation", "pooled"]
"""What a contender has to go by; a baseline is a federation by another method (`grandrounds compare`)."""
Standing = Literal["ahead", "level", "behind"]
Tone = Literal["gain", "mixed", "none"]

# On one split of a few hundred test cases, less than this is chance as often as not.
_NOISE_OF_ONE_SEED = 0.01
# Student's t, two-sided 5 %, by degrees of freedom from 1; the last one serves for all that are larger.
_STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

_NEEDS_ALL = "not computable in a deployment: nobody there holds all records"
_NEEDS_BUDGET = "not computable in a deployment: it would spend every site's budget a second time"


@dataclass(frozen=True)
class Contender:
    """One way to a model that a summary may have results for.

    Args:
        key: Its field in `common.summary.Results`.
        kind: What it had to go by.
        name: What a table calls it.
        in_a_sentence: What a sentence calls it.
        meaning: One line for a reader who meets it for the first time.
        absent: Why it may not be there.
    """

    key: str
    kind: Kind
    name: str
    in_a_sentence: str
    meaning: str
    absent: str


CONTENDERS = (
    Contender(
        key="teacher_alone",
        kind="public",
        name="Teacher alone",
        in_a_sentence="the public teacher alone",
        meaning="The central model before the first round.",
        absent="no teacher: the run started from nothing",
    ),
    Contender(
        key="public_only",
        kind="public",
        name="Public data alone",
        in_a_sentence="the best model from public data alone",
        meaning="The best that the labelled public cases give by themselves.",
        absent="no labelled public cases",
    ),
    Contender(
        key="public_only_if_labelled",
        kind="public",
        name="Public data, all labelled",
        in_a_sentence="public data with every proxy case labelled",
        meaning="What public data would give, had someone labelled every proxy case.",
        absent="not computed: it needs the labels of all proxy cases",
    ),
    Contender(
        key="sites_alone",
        kind="sites",
        name="Sites alone, on average",
        in_a_sentence="a site alone, on average",
        meaning="Each site trains by itself, under its own privacy budget.",
        absent=_NEEDS_BUDGET,
    ),
    Contender(
        key="federation",
        kind="federation",
        name="Federation",
        in_a_sentence="the federation",
        meaning="The central model in the end.",
        absent="not computed",
    ),
    Contender(
        key="student",
        kind="federation",
        name="Student sent back",
        in_a_sentence="the student that is sent back",
        meaning="The model that every site receives at the end.",
        absent="not evaluated",
    ),
    Contender(
        key="pooled_dp",
        kind="pooled",
        name="All records pooled, same privacy",
        in_a_sentence="one trusted party holding all records under the same privacy budget",
        meaning="One trusted party holds all records, with the same privacy budget and start.",
        absent=_NEEDS_ALL,
    ),
    Contender(
        key="pooled_no_privacy",
        kind="pooled",
        name="All records pooled, no privacy",
        in_a_sentence="one trusted party holding all records, without any privacy,",
        meaning="One trusted party holds all records and adds no noise.",
        absent=_NEEDS_ALL,
    ),
)


POOLED_AT_THE_LARGEST = Contender(
    key="pooled_dp",
    kind="pooled",
    name="All records pooled, largest ε",
    in_a_sentence="one trusted party holding all records under the largest of the sites' ε",
    meaning="One trusted party holds all records, under the largest of the sites' budgets, same start.",
    absent=_NEEDS_ALL,
)
"""What `pooled_dp` is where sites' budgets differ: no one party can be held to all of them."""


def contenders(summary: Summary) -> tuple[Contender, ...]:
    """The contenders, as they are called in this run."""
    if not budgets_differ(summary):
        return CONTENDERS
    return tuple(POOLED_AT_THE_LARGEST if one.key == "pooled_dp" else one for one in CONTENDERS)


def budgets_differ(summary: Summary) -> bool:
    """Whether sites planned with other ε than one another."""
    return len({line.epsilon for line in summary.privacy}) > 1


@dataclass(frozen=True)
class Line:
    """A contender, or one site alone, as tables and pictures show it; `metrics` is None if not computed."""

    name: str
    kind: Kind
    metrics: Metrics | None
    meaning: str = ""
    absent: str = ""
    is_federation: bool = False
    is_single_site: bool = False


def lines(summary: Summary) -> list[Line]:
    """List the contenders in the order of reading, each single site below the mean of the sites."""
    found = []
    for contender in contenders(summary):
        metrics: Metrics | None = getattr(summary.results, contender.key)
        found.append(
            Line(
                contender.name,
                contender.kind,
                metrics,
                contender.meaning,
                _why_absent(contender, summary) if metrics is None else "",
                is_federation=contender.key == "federation",
            )
        )
        if contender.key == "sites_alone":
            each = summary.results.sites_alone_each or {}
            found += [Line(plain(site), "sites", alone, is_single_site=True) for site, alone in each.items()]
    return found


def _why_absent(contender: Contender, summary: Summary) -> str:
    if summary.simulated and contender.absent in (_NEEDS_ALL, _NEEDS_BUDGET):
        return f"left out of this simulation; {contender.absent}"
    return contender.absent


@dataclass(frozen=True)
class Comparison:
    """The federation against another contender, seed by seed.

    Args:
        difference: Mean of ours minus theirs, as a fraction.
        agreeing: Seeds in which the difference had the sign of the mean.
        seeds: Seeds in all.
        standing: Which of the two is clearly higher, if any.
    """

    difference: float
    agreeing: int
    seeds: int
    standing: Standing


def compare(ours: Statistic, theirs: Statistic) -> Comparison:
    """Compare two contenders of one summary, whose values belong to the same seeds."""
    differences = [a - b for a, b in zip(ours.values, theirs.values, strict=True)]
    seeds, mean = len(differences), math.fsum(differences) / len(differences)
    noise = _NOISE_OF_ONE_SEED
    if seeds > 1:
        variance = math.fsum((difference - mean) ** 2 for difference in differences) / (seeds - 1)
        noise = _STUDENT[min(seeds - 1, len(_STUDENT)) - 1] * math.sqrt(variance / seeds)
    standing: Standing = "level"
    if abs(mean) >= max(SMALLEST_SHOWN, noise):
        standing = "ahead" if mean > 0 else "behind"
    agreeing = sum(difference * mean > 0 for difference in differences)
    return Comparison(mean, agreeing, seeds, standing)


@dataclass(frozen=True)
class Verdict:
    """A headline, the sentences that it rests on, and whether it is good news."""

    headline: str
    sentences: tuple[str, ...]
    tone: Tone


def verdict(summary: Summary) -> Verdict:
    """Say in plain words whether learning together was worth it."""
    ours = summary.results.federation[summary.headline_metric]
    start = public_start(summary)
    alone = best_site(summary)
    others = [other for other in (start, alone) if other is not None]
    headline, tone = _headline(
        None if start is None else compare(ours, start[1]).standing,
        None if alone is None else compare(ours, alone[1]).standing,
        in_one=" in this one repetition" if len(summary.seeds) == 1 else "",
    )
    return Verdict(
        headline,
        (
            _reached(summary, ours),
            *(_against(compare(ours, theirs), name, theirs) for name, theirs in others),
            *_had_it_been_labelled(summary, ours),
            *_price(summary, ours),
            *_warnings(summary),
        ),
        tone,
    )


def public_start(summary: Summary) -> tuple[str, Statistic] | None:
    """Return name and headline score of the best that public data, as labelled, gave; None if unknown."""
    return _best_of(summary, ("teacher_alone", "public_only"))


def best_site(summary: Summary) -> tuple[str, Statistic] | None:
    """Return name and headline score of the best site alone, else of the sites' mean; None if unknown."""
    each = {
        site: metrics[summary.headline_metric]
        for site, metrics in (summary.results.sites_alone_each or {}).items()
        if summary.headline_metric in metrics
    }
    if not each:
        return _best_of(summary, ("sites_alone",))
    site = max(each, key=lambda name: each[name].mean)
    return f"the best site alone, {plain(site)}", each[site]


def _best_of(summary: Summary, keys: Sequence[str]) -> tuple[str, Statistic] | None:
    found = [
        (contender.in_a_sentence, metrics[summary.headline_metric])
        for contender in contenders(summary)
        if contender.key in keys
        and (metrics := getattr(summary.results, contender.key)) is not None
        and summary.headline_metric in metrics
    ]
    return max(found, key=lambda named: named[1].mean, default=None)


def _headline(start: Standing | None, alone: Standing | None, in_one: str) -> tuple[str, Tone]:
    table: dict[tuple[Standing | None, Standing | None], tuple[str, Tone]] = {
        (None, None): ("There is nothing here to compare the federation with.", "none"),
        ("ahead", "ahead"): (
            f"Learning together paid off{in_one}: better than public data alone and than any site alone.",
            "gain",
        ),
        ("ahead", None): (f"Learning together paid off{in_one}: better than public data alone.", "gain"),
        (None, "ahead"): (f"Learning together paid off{in_one}: better than any site alone.", "gain"),
        ("ahead", "level"): (
            f"Better than public data alone{in_one}, but not clearly better than the best site alone.",
            "mixed",
        ),
        ("ahead", "behind"): (
            f"Better than public data alone{in_one}, but the best site did better by itself.",
            "mixed",
        ),
        ("level", "ahead"): (
            f"Better than any site alone{in_one}, but not clearly better than public data alone.",
            "mixed",
        ),
    }
    if (start, alone) in table:
        return table[start, alone]
    if start == "behind":
        return f"Learning together was not worth it{in_one}: public data alone did better.", "none"
    if alone == "behind":
        return f"Learning together was not worth it{in_one}: the best site did better by itself.", "none"
    return f"No clear gain from learning together{in_one}.", "none"


def _reached(summary: Summary, ours: Statistic) -> str:
    rounds = rounds_held(summary.rounds, summary.rounds_planned)
    sites = counted(len(summary.sites), "site")
    seeds = len(summary.seeds)
    spread = f" (mean ± standard deviation of {seeds} repetitions)" if seeds > 1 else ""
    reached = f"{metric_name(summary.headline_metric)} {score(ours)}{spread}"
    return f"After {rounds} with {sites} the federation reached {reached} on public test cases."


def _against(comparison: Comparison, name: str, theirs: Statistic) -> str:
    named = f"{name} ({theirs.mean * 100:.1f})"
    side = "above" if comparison.difference > 0 else "below"
    if abs(comparison.difference) < SMALLEST_SHOWN:
        return f"It is level with {named}."
    distance = f"{points(comparison.difference)} {side}"
    if comparison.seeds == 1 and comparison.standing == "level":
        return f"It is about level with {named}: {distance}."
    if comparison.seeds == 1:
        return f"It is {distance} {named}."
    tally = f"in {comparison.agreeing} of {comparison.seeds} repetitions"
    if comparison.standing == "level":
        return f"It is not clearly different from {named}: {distance}, {tally}, within the scatter."
    return f"It is {distance} {named}, {tally}."


def _had_it_been_labelled(summary: Summary, ours: Statistic) -> list[str]:
    labelled = _best_of(summary, ("public_only_if_labelled",))
    if labelled is None:
        return []
    consequence = {
        "ahead": "still less",
        "level": "not clearly different, so labelling them might have done as well",
        "behind": "which is more, so labelling them would have done better",
    }[compare(ours, labelled[1]).standing]
    given = f"{labelled[1].mean * 100:.1f}"
    return [f"Had every proxy case been labelled, public data alone would have given {given}: {consequence}."]


def _price(summary: Summary, ours: Statistic) -> list[str]:
    reached = []
    same = "under the same privacy budget", "keeping the records apart cost"
    largest = "under the largest of the sites' ε", "keeping the records apart, some of them under less, cost"
    for key, condition, price in (
        ("pooled_dp", *(largest if budgets_differ(summary) else same)),
        ("pooled_no_privacy", "without privacy", "privacy and keeping the records apart cost"),
    ):
        pooled = _best_of(summary, (key,))
        if pooled is not None:
            lost = -compare(ours, pooled[1]).difference
            cost = points(lost) if lost >= SMALLEST_SHOWN else "nothing that shows"
            reached.append(f"{pooled[1].mean * 100:.1f} {condition} ({price} {cost})")
    return [f"One trusted party with all records would reach {' and '.join(reached)}."] if reached else []


def _warnings(summary: Summary) -> list[str]:
    sentences = []
    if len(summary.seeds) == 1:
        sentences.append("This is a single repetition: differences of a point or two may be chance.")
    if any(row.left_out for row in summary.history):
        sentences.append("Not all sites took part in every round (see below).")
    return sentences
