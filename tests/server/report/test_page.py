"""The report: what it shows, what it admits, and what hostile names can't do to it."""

import html
import io
import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from common.summary import (
    Bytes,
    LeftOut,
    Metrics,
    PublicSizes,
    Results,
    Round,
    SitePrivacy,
    Summary,
    statistic,
)
from server.report.page import render
from server.report.terminal import results_table

HOSPITALS = {"cleveland": 167, "hungary": 162, "switzerland": 68, "va-long-beach": 110}


def scores(mean: float, spread: Sequence[float], gain: float = 0.0) -> Metrics:
    auroc = [min(mean + gain + step, 1.0) for step in spread]
    return {"auroc": statistic(auroc), "accuracy": statistic(0.9 * value for value in auroc)}


def heart(
    seeds: int, federation: float = 0.872, backend: Literal["inprocess", "deployment"] = "inprocess"
) -> Summary:
    """Four hospitals as measured: sites alone far apart, a teacher of 60 labels, spread over splits 1.9."""
    spread = np.linspace(-0.026, 0.024, seeds) if seeds > 1 else [0.0]
    wobble = [step + 0.003 * (-1) ** index for index, step in enumerate(spread)]
    alone = {"cleveland": 0.864, "hungary": 0.855, "switzerland": 0.435, "va-long-beach": 0.77}
    each = {site: scores(mean, wobble) for site, mean in alone.items()}
    simulated = backend == "inprocess"
    results = Results(
        teacher_alone=scores(0.851, wobble),
        public_only=scores(0.851, wobble),
        public_only_if_labelled=scores(0.870, spread),
        sites_alone=scores(sum(alone.values()) / 4, wobble) if simulated else None,
        sites_alone_each=each if simulated else None,
        federation=scores(federation, spread),
        student=scores(federation - 0.001, spread),
        pooled_dp=scores(0.872, wobble) if simulated else None,
        pooled_no_privacy=scores(0.874, spread) if simulated else None,
    )
    history = tuple(
        Round(
            seed=seed,
            round=number,
            metrics={
                "auroc": 0.851
                + step
                + (federation - 0.851) * (1 - math.exp(-number / 5))
                + 0.002 * math.sin(7 * number + seed),
                "accuracy": 0.78,
            },
            epsilon_spent=0.994 * math.sqrt(number / 20),
            answered=tuple(
                site for site in HOSPITALS if site != "switzerland" or number not in (7, 8, 9, 12)
            ),
            left_out=(LeftOut(site="switzerland", reason="no answer within 600 s"),)
            if number in (7, 8, 9, 12)
            else (),
            bytes_up=Bytes(mean=262.0, max=270),
        )
        for seed, step in enumerate(spread)
        for number in range(1, 21)
    )
    return Summary(
        scenario="heart",
        seeds=tuple(range(seeds)),
        results=results,
        privacy=tuple(
            SitePrivacy(
                site=site,
                epsilon=0.9936,
                delta=1e-5,
                unit="record",
                adjacency="add-remove",
                accountant="gaussian-exact",
                noise_multiplier=17.32,
                clipping_norm=0.5,
            )
            for site in HOSPITALS
        ),
        bytes_up_per_site_per_round=Bytes(mean=262.4, max=270),
        wire_bytes_up_per_site_per_round=Bytes(mean=702.1, max=711),
        rounds=20,
        seconds=11.2 * seeds,
        peak_memory_mib=612.3,
        method="descent",
        backend=backend,
        run_id="20251124-heart-1",
        finished=datetime(2025, 11, 24, 9, 30, tzinfo=UTC),
        classes=("no disease", "disease"),
        public=PublicSizes(proxy=184, proxy_labelled=60, validation=0, test=230),
        declared_sizes=HOSPITALS,
        proxy_digests=tuple(f"{seed:064x}" for seed in range(seeds)),
        run_config={
            "scenario": "heart",
            "method": "descent",
            "num-rounds": 20,
            "privacy.epsilon": 1.0,
            "privacy.delta": 1e-5,
        },
        history=history,
        versions={"flwr": "1.41.0", "torch": "2.13.0", "opacus": "1.6.0"},
    )


def fashion() -> Summary:
    """Ten classes, five sites, three seeds, accuracy in front, only the teacher to compare with."""
    sites = [f"site-{number}" for number in range(1, 6)]

    def both(mean: float, step: float) -> Metrics:
        return {
            "accuracy": statistic([mean - step, mean, mean + step]),
            "auroc": statistic([0.9 + mean / 12 - step / 5, 0.9 + mean / 12, 0.9 + mean / 12 + step / 5]),
        }

    return Summary(
        scenario="fashion",
        seeds=(0, 1, 2),
        results=Results(
            teacher_alone=both(0.751, 0.008),
            public_only=both(0.751, 0.008),
            federation=both(0.843, 0.003),
            student=both(0.841, 0.003),
        ),
        privacy=tuple(
            SitePrivacy(
                site=site,
                epsilon=1.0,
                delta=8e-5,
                unit="record",
                adjacency="add-remove",
                accountant="gaussian-exact",
            )
            for site in sites
        ),
        bytes_up_per_site_per_round=Bytes(mean=4004.0, max=4004),
        wire_bytes_up_per_site_per_round=Bytes(mean=4430.0, max=4431),
        rounds=30,
        seconds=402.0,
        peak_memory_mib=1450.0,
        method="descent",
        backend="inprocess",
        headline_metric="accuracy",
        classes=tuple(f"class {number}" for number in range(10)),
        public=PublicSizes(proxy=3000, proxy_labelled=300, validation=1000, test=10_000),
        declared_sizes=dict.fromkeys(sites, 2400),
        run_config={"scenario": "fashion", "num-rounds": 30},
        history=tuple(
            Round(
                seed=seed,
                round=number,
                metrics={"accuracy": 0.751 + 0.092 * (1 - math.exp(-number / 7)) + 0.002 * seed},
                epsilon_spent=math.sqrt(number / 30),
                answered=tuple(sites),
            )
            for seed in range(3)
            for number in range(1, 31)
        ),
    )


def text_of(page: str) -> str:
    """What a reader sees, white space folded."""
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def table_text(summary: Summary, width: int = 140) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(results_table(summary))
    return console.export_text()


SAMPLES = {
    "one seed": heart(1),
    "five seeds": heart(5),
    "lost": heart(5, federation=0.845),
    "deployment": heart(1, backend="deployment"),
    "ten classes": fashion(),
}


@pytest.fixture(params=SAMPLES.values(), ids=SAMPLES.keys())
def sample(request: pytest.FixtureRequest) -> Summary:
    summary: Summary = request.param
    return summary


class Outline(HTMLParser):
    """Checks that tags nest, and collects ids and everything that a browser could fetch."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "data", "action") and not (value or "").startswith("#"):
                self.fetched.append(value or "")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    parser.close()
    return parser


def test_page_is_whole_and_fetches_nothing(sample: Summary) -> None:
    page = render(sample)
    found = outline(page)
    assert found.open == []
    assert found.fetched == []
    assert not found.tags & {"script", "link", "iframe", "object", "img"}
    assert "http://" not in page and "https://" not in page and "@import" not in page
    assert len(found.ids) == len(set(found.ids))
    assert len(page.encode()) < 1_000_000


def test_references_inside_pictures_have_targets(sample: Summary) -> None:
    page = render(sample)
    ids = set(outline(page).ids)
    assert set(re.findall(r'xlink:href="#([^"]+)"', page)) <= ids
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= ids


def test_same_summary_gives_same_page(sample: Summary) -> None:
    assert render(sample) == render(sample)


def test_every_epsilon_has_all_that_gives_it_a_meaning() -> None:
    shown = text_of(render(heart(5)))
    row = "cleveland 0.994 1e-5 one record add/remove one exact Gaussian this run alone 17.3 0.5"
    assert row in shown
    assert "adds to it" in shown
    for site in HOSPITALS:
        assert site in shown


def test_shows_scores_bytes_and_absences() -> None:
    shown = text_of(render(heart(5)))
    assert "87.1 ± 2.0" in shown
    assert "262 bytes" in shown and "702 bytes" in shown
    assert "switzerland no answer within 600 s 7–9, 12 (seeds 0–4)" in shown
    assert "switzerland 68 80 of 100" in shown


def test_public_part_is_an_assumption_with_its_sizes() -> None:
    shown = text_of(render(heart(1)))
    assert "184 proxy cases" in shown and "60 of them labelled" in shown and "230 test cases" in shown
    assert "public by assumption" in shown
    owned = heart(1).model_copy(
        update={"public": PublicSizes(proxy=9, proxy_labelled=9, validation=0, test=9, by_assumption=False)}
    )
    assert "public by assumption" not in text_of(render(owned))


def test_says_what_is_not_promised() -> None:
    shown = text_of(render(heart(1)))
    assert "no verdict on compliance" in shown
    assert "mix of labels is not hidden" in shown
    assert "A patient at two sites counts at each" in shown
    assert "This was a simulation" in shown
    assert "This was a simulation" not in text_of(render(heart(1, backend="deployment")))


def test_what_a_deployment_cannot_know_is_said() -> None:
    shown = text_of(render(heart(1, backend="deployment")))
    assert shown.count("not computable in a deployment") == 3
    assert "left out of this simulation" not in shown
    assert (
        text_of(render(fashion())).count("left out of this simulation; not computable in a deployment") == 3
    )


def test_stopped_run_says_so() -> None:
    stopped = heart(1).model_copy(
        update={"status": "incomplete", "incomplete_because": "fewer than min-sites answered"}
    )
    assert "This run stopped before its end. fewer than min-sites answered" in text_of(render(stopped))


def test_bare_contract_can_be_rendered() -> None:
    """The fields that the contract names are enough for a report."""
    bare = Summary(
        scenario="own",
        seeds=(0,),
        results=Results(federation={"auroc": statistic([0.8])}),
        privacy=(),
        bytes_up_per_site_per_round=Bytes(mean=0.0, max=0),
        rounds=0,
        seconds=0.0,
        peak_memory_mib=0.0,
    )
    shown = text_of(render(bare))
    assert "nothing here to compare" in shown
    assert "Round by round" not in shown
    table_text(bare)


def test_hundred_sites_stay_readable() -> None:
    sites = [f"site-{number}" for number in range(100)]
    crowd = heart(1)
    results = crowd.results.model_copy(
        update={
            "sites_alone_each": {site: scores(0.6 + 0.002 * index, [0.0]) for index, site in enumerate(sites)}
        }
    )
    privacy = tuple(crowd.privacy[0].model_copy(update={"site": site}) for site in sites)
    history = tuple(
        row.model_copy(update={"left_out": tuple(LeftOut(site=site, reason="late") for site in sites)})
        for row in crowd.history
    )
    crowd = crowd.model_copy(
        update={
            "results": results,
            "privacy": privacy,
            "history": history,
            "declared_sizes": dict.fromkeys(sites, 50),
        }
    )
    page = render(crowd)
    assert "40 more in summary.json" in text_of(page)
    assert len(page.encode()) < 1_000_000
    assert "site-0, site-1, site-2, site-3, site-4, site-5, site-6, site-7 and 92 more" in text_of(page)
    assert "and 92 more: ε" in table_text(crowd)


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}{% raw %}",
    "$\\frac{1}{0$ a_b^c",
    "--><!-- ]]>",
    "[red]bold[/] \x1b[2J\x07",
    "Klinikum 東京 \U0001f3e5",
    "x" * 5000,
    "",
    'id="a" url(#b) #010013',
]


def under_name(site: str) -> Summary:
    known = heart(1)
    assert known.results.sites_alone_each is not None
    alone = {**known.results.sites_alone_each, site: scores(0.8, [0.0])}
    return known.model_copy(
        update={
            "results": known.results.model_copy(update={"sites_alone_each": alone}),
            "privacy": (*known.privacy, known.privacy[0].model_copy(update={"site": site})),
            "declared_sizes": {**known.declared_sizes, site: 10},
            "run_config": {"scenario": site},
            "classes": (site, "other"),
            "history": tuple(
                row.model_copy(update={"left_out": (LeftOut(site=site, reason=site),)})
                for row in known.history
            ),
        }
    )


@pytest.mark.parametrize("site", HOSTILE)
def test_hostile_names_are_shown_and_do_nothing(site: str) -> None:
    page = render(under_name(site))
    found = outline(page)
    assert found.open == [] and found.fetched == []
    assert not found.tags & {"script", "img"}
    assert "\x1b" not in page and "\x07" not in page
    if site.startswith("<script"):
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    if site.startswith("{{"):
        assert "{{ 7 * 7 }}" in html.unescape(page)


@pytest.mark.parametrize("site", HOSTILE)
def test_hostile_names_do_not_steer_the_terminal(site: str) -> None:
    shown = table_text(under_name(site), width=400)
    assert "\x1b" not in shown and "\x07" not in shown
    if site.startswith("[red]"):
        assert "[red]bold[/]" in shown


@settings(max_examples=15, deadline=None)
@given(st.text(max_size=80))
def test_any_name_can_be_drawn(site: str) -> None:
    assert outline(render(under_name(site))).open == []


def test_terminal_table_has_a_row_for_each_contender_and_the_privacy() -> None:
    shown = table_text(heart(5))
    for name in (
        "Teacher alone",
        "Federation",
        "cleveland",
        "All records pooled, no privacy",
        "AUROC",
        "accuracy",
    ):
        assert name in shown
    assert "87.1 ± 2.0" in shown
    assert (
        "cleveland, hungary, switzerland, va-long-beach: ε = 0.994, δ = 1e-5, one record, add/remove one, "
        "exact Gaussian, this run alone"
    ) in " ".join(shown.split())
