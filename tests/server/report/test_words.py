"""Formats that a reader relies on: bounds are rounded up, and others' text is only ever text."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.summary import SitePrivacy, statistic
from server.report import words


def line(epsilon: float, unit: str = "record", horizon: str = "run") -> SitePrivacy:
    return SitePrivacy.model_validate(
        {
            "site": "a",
            "epsilon": epsilon,
            "delta": 1e-5,
            "unit": unit,
            "adjacency": "add-remove",
            "accountant": "gaussian-exact",
            "horizon": horizon,
        }
    )


@given(st.floats(0, 1e6))
def test_bounds_are_never_shown_smaller_than_they_are(value: float) -> None:
    shown = float(words.at_most(value).replace(",", ""))
    assert shown >= value
    assert shown <= value * 1.011 or value == 0


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.9931, "0.994"),
        (0.99, "0.990"),
        (1.0, "1.00"),
        (9.991, "10.00"),
        (12.34, "12.4"),
        (22026.5, "22,100"),
    ],
)
def test_at_most(value: float, shown: str) -> None:
    assert words.at_most(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(1e-5, "1e-5"), (8e-5, "8e-5"), (0.0125, "1.25e-2"), (0.0, "0")]
)
def test_delta(value: float, shown: str) -> None:
    assert words.delta(value) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999.4, "999 bytes"),
        (999.6, "1.0 kB"),
        (4004, "4.0 kB"),
        (1.3e6, "1.3 MB"),
        (2e9, "2.0 GB"),
    ],
)
def test_size(count: float, shown: str) -> None:
    assert words.size(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(11.24, "11.2 s"), (250.0, "4 min 10 s"), (12_000.0, "3 h 20 min")]
)
def test_duration(seconds: float, shown: str) -> None:
    assert words.duration(seconds) == shown


def test_score_has_a_spread_only_with_several_seeds() -> None:
    assert words.score(statistic([0.872])) == "87.2"
    assert words.score(statistic([0.86, 0.88])) == "87.0 ± 1.4"


def test_signs() -> None:
    assert words.signed(0.0213) == "+2.1"
    assert words.signed(-0.0213) == "−2.1"
    assert words.signed(-0.0004) == "0.0"
    assert words.points(0.01) == "1.0 point"


def test_recognised_is_the_bound_of_differential_privacy() -> None:
    assert words.recognised(line(1.0)) == pytest.approx(math.e * 0.01 + 1e-5)
    assert words.recognised(line(800.0)) == 1.0


def test_guarantees_name_all_terms() -> None:
    assert words.guarantee(line(0.9931)) == (
        "ε = 0.994, δ = 1e-5, one record, add/remove one, exact Gaussian, this run alone"
    )
    full = words.guarantee_in_full(line(1.0, unit="patient", horizon="lifetime"))
    for term in ("certain patient", "add/remove", "e^1.00 = 2.72", "1e-5", "exact Gaussian", "ever used for"):
        assert term in full


@given(st.text())
def test_plain_text_is_short_and_printable(text: str) -> None:
    shown = words.plain(text)
    assert len(shown) <= 60
    assert shown.isprintable()


@given(st.lists(st.integers(1, 60)))
def test_numbers_can_be_read_back(listed: list[int]) -> None:
    read: list[int] = []
    for part in filter(None, words.numbers(listed).split(", ")):
        first, _, last = part.partition("–")
        read += range(int(first), int(last or first) + 1)
    assert read == sorted(set(listed))
