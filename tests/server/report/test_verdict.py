"""The verdict says what the numbers say, and no more."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from common.summary import Bytes, Results, SitePrivacy, Summary, statistic
from server.report.verdict import best_site, compare, lines, public_start, verdict

SPREAD = (-0.02, -0.01, 0.0, 0.01, 0.02)


def at(mean: float, wobble: float = 0.001, spread: tuple[float, ...] = SPREAD) -> dict[str, object]:
    """Scores that share the luck of each split and differ a little beside it."""
    own = [wobble * (-1) ** index for index in range(len(spread))]
    return {"auroc": statistic(mean + common + extra for common, extra in zip(spread, own, strict=True))}


def summary(spread: tuple[float, ...] = SPREAD, **results: float | dict[str, float]) -> Summary:
    given_results: dict[str, object] = {}
    for name, value in results.items():
        if isinstance(value, dict):
            given_results[name] = {site: at(mean, spread=spread) for site, mean in value.items()}
        else:
            given_results[name] = at(value, 0.0 if name == "federation" else 0.001, spread)
    return Summary(
        scenario="heart",
        seeds=tuple(range(len(spread))),
        results=Results.model_validate(given_results),
        privacy=(),
        bytes_up_per_site_per_round=Bytes(mean=1.0, max=1),
        rounds=20,
        seconds=1.0,
        peak_memory_mib=1.0,
    )


@pytest.mark.parametrize(
    ("results", "headline", "tone"),
    [
        (
            {"teacher_alone": 0.85, "sites_alone_each": {"a": 0.86, "b": 0.5}},
            "paid off: better than public data alone and than any",
            "gain",
        ),
        (
            {"teacher_alone": 0.85, "sites_alone_each": {"a": 0.87}},
            "not clearly better than the best site",
            "mixed",
        ),
        (
            {"teacher_alone": 0.85, "sites_alone_each": {"a": 0.89}},
            "the best site did better by itself",
            "mixed",
        ),
        (
            {"teacher_alone": 0.87, "sites_alone_each": {"a": 0.86}},
            "not clearly better than public data",
            "mixed",
        ),
        ({"teacher_alone": 0.87, "sites_alone_each": {"a": 0.87}}, "No clear gain", "none"),
        ({"teacher_alone": 0.87, "sites_alone_each": {"a": 0.89}}, "was not worth it: the best site", "none"),
        ({"teacher_alone": 0.89, "sites_alone_each": {"a": 0.5}}, "was not worth it: public data", "none"),
        ({"public_only": 0.89, "teacher_alone": 0.8}, "was not worth it: public data", "none"),
        ({"teacher_alone": 0.85}, "paid off: better than public data alone.", "gain"),
        ({"sites_alone": 0.85}, "paid off: better than any site alone.", "gain"),
        ({}, "nothing here to compare", "none"),
    ],
)
def test_headline_follows_the_numbers(results: dict[str, float], headline: str, tone: str) -> None:
    found = verdict(summary(federation=0.87, **results))
    assert headline in found.headline
    assert found.tone == tone


def test_sentences_name_distance_and_tally() -> None:
    said = " ".join(
        verdict(summary(federation=0.872, teacher_alone=0.851, sites_alone_each={"a": 0.8728})).sentences
    )
    assert "After 20 rounds with 0 sites the federation reached AUROC 87.2 ± 1.6" in said
    assert "in 5 of 5 repetitions" in said
    assert "It is not clearly different from the best site alone, a (87.3)" in said


def test_labels_that_would_have_done_as_well_are_mentioned() -> None:
    start = {"federation": 0.872, "teacher_alone": 0.851}
    for labelled, consequence in (
        (0.85, "still less"),
        (0.872, "might have done as well"),
        (0.89, "would have done better"),
    ):
        assert consequence in " ".join(verdict(summary(public_only_if_labelled=labelled, **start)).sentences)


def test_price_of_privacy() -> None:
    said = " ".join(verdict(summary(federation=0.87, pooled_dp=0.86, pooled_no_privacy=0.885)).sentences)
    assert "86.0 under the same privacy budget (keeping the records apart cost nothing that shows)" in said
    assert "without privacy (privacy and keeping the records apart cost 1.5 points)" in said


def test_where_budgets_differ_the_pooled_party_is_not_said_to_have_the_same() -> None:
    one = summary(federation=0.88, pooled_dp=0.9)
    paid = {"delta": 1e-5, "unit": "record", "adjacency": "add-remove", "accountant": "gaussian-exact"}
    budgets = (("a", 0.3), ("b", 1.0))
    privacy = tuple(SitePrivacy(site=site, epsilon=epsilon, **paid) for site, epsilon in budgets)
    unlike = one.model_copy(update={"privacy": privacy})
    words = " ".join([*verdict(unlike).sentences, *(line.name for line in lines(unlike))])
    assert "All records pooled, largest ε" in words
    assert "under the largest of the sites' ε" in words and "same privacy" not in words


def test_one_repetition_claims_little() -> None:
    one = summary((0.0,), federation=0.872, teacher_alone=0.84, sites_alone_each={"a": 0.866})
    said = verdict(one)
    assert "in this one repetition" in said.headline and said.tone == "mixed"
    assert "may be chance" in " ".join(said.sentences)
    assert "about level with the best site alone" in " ".join(said.sentences)


def test_the_better_public_model_and_the_best_site_are_the_yardsticks() -> None:
    one = summary(federation=0.87, teacher_alone=0.8, public_only=0.85, sites_alone_each={"a": 0.7, "b": 0.8})
    start, site = public_start(one), best_site(one)
    assert start is not None and "public data" in start[0]
    assert site is not None and site[0].endswith("b")


def test_lines_say_why_something_is_absent() -> None:
    absent = {line.name: line.absent for line in lines(summary(federation=0.8)) if line.metrics is None}
    assert len(absent) == 7
    assert all(absent.values())
    assert "not computable in a deployment" in absent["All records pooled, no privacy"]


def test_comparison_agrees_with_a_paired_t_test() -> None:
    generator = np.random.default_rng(0)
    for seeds in (2, 3, 5, 8, 11):
        for _ in range(50):
            ours, theirs = generator.uniform(0.3, 0.7, (2, seeds)) + generator.uniform(-0.3, 0.3)
            comparison = compare(statistic(ours), statistic(theirs))
            clear = ttest_rel(ours, theirs).pvalue < 0.05
            assert (comparison.standing != "level") == clear


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12))
def test_comparison_is_antisymmetric(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = (statistic(values) for values in zip(*pairs, strict=True))
    one, other = compare(ours, theirs), compare(theirs, ours)
    assert one.difference == -other.difference
    assert one.agreeing == other.agreeing
    assert {one.standing, other.standing} in ({"level"}, {"ahead", "behind"})
