"""The encoding: constants from the proxy only, bounded values, and complaints that quote no record."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from common.errors import UserError
from common.preprocessing import CategoricalSpec, NumericSpec, PixelsSpec, Preprocessing, Text, check_schema
from common.records import AnyArray, Records, bands, concatenate

CLASSES = ("no", "yes")
SPECS = (
    NumericSpec(name="age", low=0.0, high=120.0, missing_flag=True),
    NumericSpec(name="troponin", transform="log", tails=(0.1, 0.25)),
    CategoricalSpec(name="ward", categories=("medical", "surgical")),
    CategoricalSpec(name="smoker", categories=("no", "yes"), reference=True, other_column=True),
)


def records(count: int = 40, seed: int = 0, **changes: AnyArray) -> Records:
    generator = np.random.default_rng(seed)
    columns: dict[str, AnyArray] = {
        "age": generator.integers(20, 90, count).astype(float),
        "troponin": generator.lognormal(0, 2, count),
        "ward": generator.choice(["medical", "surgical", ""], count),
        "smoker": generator.choice(["no", "yes", ""], count),
    }
    return Records({**columns, **changes}, generator.choice(CLASSES, count), None, {})


FITTED = Preprocessing.fit(records(), SPECS, CLASSES)


def test_numbers_are_centred_and_divided_by_two_deviations_of_the_proxy() -> None:
    x = FITTED.encode(records()).x
    age = FITTED.encoded_names.index("age")
    assert x.dtype == np.float32 and x.shape == (40, *FITTED.case_shape)
    assert x[:, age].mean() == pytest.approx(0, abs=1e-4)
    assert x[:, age].std() == pytest.approx(0.5, abs=1e-4)


def test_columns_are_named_in_the_order_of_the_encoding() -> None:
    names = FITTED.encoded_names
    assert names[:2] == ("age", "age missing")
    assert [name.split(" ")[1] for name in names[3:7]] == ["below", "below", "above", "above"]
    assert names[7:] == ("ward = medical", "ward = surgical", "smoker = yes", "smoker other")


def test_a_missing_value_is_the_proxys_mean_and_flagged() -> None:
    nothing = {"age": np.asarray([np.nan, -1.0, 121.0]), "troponin": np.full(3, np.nan)}
    names = {"ward": np.asarray(["", "unheard of", ""]), "smoker": np.asarray(["", "unheard of", "no"])}
    x = FITTED.encode(Records({**nothing, **names}, np.full(3, ""), None, {})).x
    np.testing.assert_array_equal(x[:, 0], 0)  # age
    np.testing.assert_array_equal(x[:, 1], 1)  # age missing, or out of its plausible range
    np.testing.assert_array_equal(x[:, 2:9], 0)
    np.testing.assert_array_equal(x[:, 10], [1, 1, 0])  # smoker other


def test_tails_flag_what_is_low_or_high_among_the_proxy() -> None:
    proxy = records(1000)
    fitted = Preprocessing.fit(proxy, SPECS, CLASSES)
    tails = fitted.encode(proxy).x[:, 3:7]
    np.testing.assert_allclose(tails.mean(axis=0), [0.1, 0.25, 0.25, 0.1], atol=0.002)


def test_labels_that_are_no_class_count_as_unlabelled() -> None:
    some = records(3)
    labelled = Records(some.columns, np.asarray(["yes", "", "perhaps"]), np.asarray(["b", "a", "b"]), {})
    cases = FITTED.encode(labelled)
    assert cases.y.tolist() == [1, -1, -1]
    assert cases.patients is not None and cases.patients.tolist() == [1, 0, 1]


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=4, max_size=4))
def test_encoded_values_are_bounded_whatever_comes(values: list[float]) -> None:
    wild = np.asarray(values)
    x = FITTED.encode(records(4, age=wild, troponin=wild)).x
    assert np.isfinite(x).all() and np.abs(x).max() <= FITTED.limit


@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=8))
def test_a_proxy_of_any_finite_numbers_can_be_fitted_or_is_refused(values: list[float]) -> None:
    count = len(values)
    wild = records(count, age=np.asarray(values), troponin=np.asarray(values))
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            fitted = Preprocessing.fit(wild, SPECS, CLASSES)
    except ValidationError:
        return
    assert np.isfinite(fitted.encode(wild).x).all()


def test_constants_come_from_the_proxy_and_encoding_learns_nothing() -> None:
    private = records(50, seed=1)
    before = FITTED.to_json()
    alone = FITTED.encode(private.take([0])).x
    shifted = records(50, seed=2, age=np.full(50, 119.0))
    together = FITTED.encode(concatenate([private.take([0]), shifted])).x[:1]
    np.testing.assert_array_equal(alone, together)
    assert FITTED.to_json() == before


def test_json_is_canonical_and_round_trips() -> None:
    text = FITTED.to_json()
    again = Preprocessing.from_json(text)
    assert again == FITTED and again.to_json() == text
    with pytest.raises(ValueError, match="format"):
        Preprocessing.from_json(text.replace('"format":1', '"format":2'))


def test_pixels_keep_their_shape() -> None:
    pixels = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    images = Records({"pixels": pixels}, np.asarray(["no", "yes"]), None, {})
    fitted = Preprocessing.fit(images, [PixelsSpec()], CLASSES)
    assert fitted.case_shape == (3, 4, 5)
    np.testing.assert_allclose(fitted.encode(images).x, pixels / 255, rtol=1e-6)
    with pytest.raises(UserError, match="shape"):
        fitted.encode(Records({"pixels": pixels[:, :1]}, images.target, None, {}))


def test_float_pixels_are_standardised_and_gaps_filled() -> None:
    pixels = np.random.default_rng(0).normal(5, 2, (10, 1, 4, 4)).astype(np.float32)
    images = Records({"pixels": pixels}, np.full(10, "no"), None, {})
    fitted = Preprocessing.fit(images, [PixelsSpec()], CLASSES)
    pixels[0, 0, 0, 0] = np.nan
    x = fitted.encode(images).x
    assert x[0, 0, 0, 0] == 0 and x.std() == pytest.approx(1, abs=0.05)


def notes(*texts: str) -> Records:
    return Records({"note": np.array(texts, dtype=object)}, np.full(len(texts), "no"), None, {})


def test_texts_become_ids_and_nothing_of_them_is_measured() -> None:
    spec = Text(name="note", vocabulary=500, length=7, pieces="words")
    fitted = Preprocessing.fit(notes("no pain", "pain"), [spec], CLASSES)
    assert fitted == Preprocessing.fit(notes("something else"), [spec], CLASSES)
    assert fitted.case_shape == (1, 7) and fitted.encoded_names == ()
    assert Preprocessing.from_json(fitted.to_json()) == fitted
    x = fitted.encode(notes("no pain", "pain", "")).x
    assert x.shape == (3, 1, 7) and x.dtype == np.float32
    assert x[0, 0, 1] == x[1, 0, 0] > 0 and not x[2].any()
    assert check_schema(notes("x" * 10_000), fitted) == []
    assert "the column isn't text" in check_schema(_columns(notes("a"), note=np.zeros(1)), fitted)[0]


@pytest.mark.parametrize("broken", [-1.0, 500.0, 0.5])
def test_ids_that_are_none_are_noticed(broken: float) -> None:
    fitted = Preprocessing.fit(notes("pain"), [Text(name="note", vocabulary=500, length=7)], CLASSES)
    x = fitted.encode(notes("no pain", "pain")).x
    assert fitted.fits(x)
    x[1, 0, 6] = broken
    assert not fitted.fits(x)


@pytest.mark.parametrize(
    ("specs", "classes"),
    [
        ((SPECS[0], SPECS[0]), CLASSES),
        (SPECS, ("no",)),
        ((Text(name="ward"), SPECS[0]), CLASSES),
        (SPECS, ("no", "no")),
        ((CategoricalSpec(name="ward", categories=("medical",), reference=True),), CLASSES),
    ],
)
def test_contradictions_are_refused(specs: tuple[NumericSpec], classes: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError):
        Preprocessing.fit(records(), specs, classes)


CHANGES: Mapping[str, tuple[Callable[[Records], Records], str]] = {
    "missing column": (lambda r: _columns(r, age=None), "age: there is no such column"),
    "words": (lambda r: _columns(r, age=np.full(len(r), "old")), "age: the column isn't numeric"),
    "unit": (lambda r: _columns(r, troponin=r.columns["troponin"] * 1e9), "troponin: most values are far"),
    "range": (
        lambda r: _columns(r, age=np.full(len(r), 777.0)),
        "values lie below 0 or above 120, which can't be",
    ),
    "category": (lambda r: _columns(r, ward=np.full(len(r), "SECRET")), "ward: some names are none of"),
    "label": (
        lambda r: Records(r.columns, np.full(len(r), "SECRET"), None, {}),
        "target: some labels are none",
    ),
    "no label": (
        lambda r: Records(r.columns, np.full(len(r), ""), None, {}),
        "target: some records have no label",
    ),
    "patient": (lambda r: Records(r.columns, r.target, np.full(len(r), ""), {}), "patient: some records"),
    "none": (lambda r: r.take(np.arange(0)), "there are no records"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_schema_check_names_the_column_and_quotes_no_value(change: str) -> None:
    make, expected = CHANGES[change]
    assert check_schema(records(), FITTED) == []
    complaints = check_schema(make(records()), FITTED)
    assert any(expected in complaint for complaint in complaints)
    assert not any("SECRET" in complaint or "777" in complaint for complaint in complaints)


def _columns(some: Records, **changes: AnyArray | None) -> Records:
    columns = {name: values for name, values in {**some.columns, **changes}.items() if values is not None}
    return Records(columns, some.target, some.patients, some.groups)


def test_bands_are_named_after_their_edges() -> None:
    named = bands(np.asarray([10.0, 45.0, 64.9, 65.0, np.nan]), (45, 65))
    assert named.tolist() == ["under 45", "45 to 65", "45 to 65", "65 and over", "unknown"]


def test_records_of_unequal_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="length"):
        Records({"age": np.zeros(2)}, np.full(3, ""), None, {})
