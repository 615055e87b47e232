"""From records to arrays, with constants that come from the public proxy only.

A `FeatureSpec` is a declaration: this column is a number (perhaps on a log scale, perhaps plausible only
within bounds), a category, an image, or free text. `Preprocessing.fit` adds what has to be measured (means,
scales, thresholds, the categories where they weren't declared) on the *proxy's* records. The result is plain
data that travels with the proxy and is part of its digest, so every site encodes its records in the same way
and none of them needs to look at its own distribution.

Numbers are divided by *two* standard deviations, so that they weigh about as much as a yes or no does (Gelman
2008, *Scaling regression inputs by dividing by two standard deviations*, Statistics in Medicine 27:2865).
Under differential privacy this matters more than usual: a clipped gradient and a fixed noise treat all
columns alike.

Every encoded number lies within ±`limit`, flags and categories are 0 or 1: a typing error at one hospital
can't make an array entry infinite. A missing number becomes the proxy's mean, i.e. 0.

A number may be given `tails`: yes/no columns for values below the proxy's t-quantile and above its (1 −
t)-quantile, as a laboratory flags a result low or high. They let a linear head treat values that are abnormal
at either end, and small heads cost little under differential privacy: on the thyroid data a linear model
without them has an AUROC of 68, with them 96, both without privacy.

Shape legend: N cases, D encoded columns, C channels, H height, W width, L ids.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from common.errors import UserError
from common.records import AnyArray, Cases, Float32s, Floats, Ints, Records
from common.strict import Strict
from common.texts import LARGEST_VOCABULARY, LEAST_VOCABULARY, Pieces, encode_texts

Name = Annotated[str, Field(min_length=1, max_length=200)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Tail = Annotated[float, Field(gt=0, lt=0.5)]
Thresholds = Annotated[tuple[Finite, ...], Field(max_length=32)]
Names = Annotated[tuple[Name, ...], Field(max_length=10_000)]
Transform = Literal["identity", "log"]


class NumericSpec(Strict):
    """A column of numbers."""

    kind: Literal["numeric"] = "numeric"
    name: Name
    transform: Transform = "identity"
    """`log` suits values that spread over orders of magnitude."""
    low: Finite | None = None
    high: Finite | None = None
    """Bounds of what is plausible: a value outside them counts as missing."""
    missing_flag: bool = False
    """Add a column that is 1 where the value is missing."""
    tails: Annotated[tuple[Tail, ...], Field(max_length=32)] = ()
    """Quantiles t at which low and high values are flagged (see the module's docstring)."""


class CategoricalSpec(Strict):
    """A column of names, encoded one-hot."""

    kind: Literal["categorical"] = "categorical"
    name: Name
    categories: Names = ()
    """In order; where none are given, those that occur in the proxy, sorted."""
    reference: bool = False
    """The first category gets no column: all zeros, as suits a "no" that nearly everyone has."""
    other_column: bool = False
    """Add a column for missing and unknown names, which are otherwise all zeros."""


class PixelsSpec(Strict):
    """A column of images or other arrays of one shape; it must be the only feature."""

    kind: Literal["pixels"] = "pixels"
    name: Name = "pixels"


class Text(Strict):
    """A column of free text; it must be the only feature. Nothing of it is measured (`common.texts`)."""

    kind: Literal["text"] = "text"
    name: Name
    pieces: Pieces = "subwords"
    """What of a text gets an id: its words, or its words and their character n-grams."""
    vocabulary: Annotated[int, Field(ge=LEAST_VOCABULARY, le=LARGEST_VOCABULARY)] = LARGEST_VOCABULARY
    """How many ids there are."""
    length: Annotated[int, Field(ge=1, le=4096)] = 256
    """Ids of one text: what it has more is left off."""

    @property
    def encoded_names(self) -> tuple[str, ...]:
        """Ids have no column names."""
        return ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one case: a line of ids, as an image has a colour of rows and columns."""
        return 1, self.length

    def encode(self, values_N: AnyArray, limit: float) -> Float32s:
        """Encode (N,) texts as (N, 1, L) ids; a missing text is all padding."""
        return encode_texts(values_N.tolist(), self.vocabulary, self.length, self.pieces)[:, None]

    def has_made(self, x: Float32s) -> bool:
        """Whether these cases can be texts of this vocabulary: they are whole numbers within it."""
        return bool(np.all((x >= 0) & (x < self.vocabulary) & (x == np.floor(x))))


FeatureSpec = Annotated[NumericSpec | CategoricalSpec | PixelsSpec | Text, Field(discriminator="kind")]


class Numeric(Strict):
    """A fitted column of numbers: (transform(v) − mean) / scale, then tails, then the missing flag."""

    kind: Literal["numeric"] = "numeric"
    name: Name
    transform: Transform
    floor: Positive
    """Smallest number a logarithm is taken of."""
    low: Finite | None
    high: Finite | None
    mean: Finite
    scale: Positive
    below: Thresholds
    """A column each: is the value below it?"""
    above: Thresholds
    missing_flag: bool

    @property
    def encoded_names(self) -> tuple[str, ...]:
        """Names of the encoded columns."""
        return (
            self.name,
            *(f"{self.name} below {threshold:g}" for threshold in self.below),
            *(f"{self.name} above {threshold:g}" for threshold in self.above),
            *((f"{self.name} missing",) if self.missing_flag else ()),
        )

    def encode(self, values_N: AnyArray, limit: float) -> Float32s:
        """Encode (N,) numbers as (N, D) float32: the number within ±limit, then zeros and ones."""
        known_N = plausible(np.asarray(values_N, dtype=np.float64), self.low, self.high)
        missing_N = np.isnan(known_N)
        with np.errstate(over="ignore"):  # what overflows is clipped to the limit
            z_N = (_transformed(known_N, self.transform, self.floor) - self.mean) / self.scale
        z_N = np.clip(np.where(missing_N, 0.0, z_N), -limit, limit)
        flags = [known_N < threshold for threshold in self.below]  # a missing number is in neither tail
        flags += [known_N > threshold for threshold in self.above]
        flags += [missing_N] if self.missing_flag else []
        return np.stack([z_N, *flags], axis=1).astype(np.float32)


class Categorical(Strict):
    """A column of names, one-hot in the order of `categories`."""

    kind: Literal["categorical"] = "categorical"
    name: Name
    categories: Names
    reference: bool
    other_column: bool

    @property
    def _columns(self) -> tuple[str, ...]:
        return self.categories[1:] if self.reference else self.categories

    @property
    def encoded_names(self) -> tuple[str, ...]:
        """Names of the encoded columns."""
        return (
            *(f"{self.name} = {category}" for category in self._columns),
            *((f"{self.name} other",) if self.other_column else ()),
        )

    def encode(self, values_N: AnyArray, limit: float) -> Float32s:
        """Encode (N,) names as (N, D) zeros and ones."""
        names_N = np.asarray(values_N, dtype=str)
        hot = [names_N == category for category in self._columns]
        hot += [~np.isin(names_N, self.categories)] if self.other_column else []
        return np.stack(hot, axis=1).astype(np.float32) if hot else np.empty((len(names_N), 0), np.float32)


class Pixels(Strict):
    """Arrays of one shape: (v − mean) / scale with one mean and scale for all entries."""

    kind: Literal["pixels"] = "pixels"
    name: Name
    shape: Annotated[tuple[Annotated[int, Field(ge=1, le=65_536)], ...], Field(min_length=1, max_length=4)]
    mean: Finite
    scale: Positive

    @property
    def encoded_names(self) -> tuple[str, ...]:
        """Arrays have no column names."""
        return ()

    def encode(self, values_NCHW: AnyArray, limit: float) -> Float32s:
        """Encode (N, C, H, W) arrays as float32 within ±limit; a missing entry is 0."""
        with np.errstate(over="ignore", invalid="ignore"):
            z_NCHW: Float32s = values_NCHW.astype(np.float32)
            z_NCHW = (z_NCHW - np.float32(self.mean)) / np.float32(self.scale)
        return np.clip(np.where(np.isnan(z_NCHW), np.float32(0), z_NCHW), -limit, limit)


Feature = Annotated[Numeric | Categorical | Pixels | Text, Field(discriminator="kind")]
WHOLE_CASES = (Pixels, Text)
"""Features that make a case by themselves."""


class Preprocessing(Strict):
    """How records become cases: everything that both sides must agree on, as plain data."""

    format: Literal[1] = 1
    features: Annotated[tuple[Feature, ...], Field(min_length=1, max_length=100_000)]
    """In the order of the encoded columns."""
    classes: Annotated[tuple[Name, ...], Field(min_length=2, max_length=10_000)]
    """In the order of the logits."""
    limit: Positive = 5.0
    """Encoded numbers are clipped to ± this: ten standard deviations of the proxy."""

    @model_validator(mode="after")
    def _consistent(self) -> "Preprocessing":
        names = [feature.name for feature in self.features]
        if len(set(names)) < len(names):
            raise ValueError("two features have the same name")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("two classes have the same name")
        if len(names) > 1 and any(isinstance(feature, WHOLE_CASES) for feature in self.features):
            raise ValueError("pixels or a text must be the only feature")
        if not isinstance(self.features[0], WHOLE_CASES) and not self.encoded_names:
            raise ValueError("the features have no encoded column (no category is known)")
        return self

    @classmethod
    def fit(cls, records: Records, specs: Sequence[FeatureSpec], classes: Sequence[str]) -> "Preprocessing":
        """Measure the constants on the proxy's records, and on nothing else.

        Args:
            records: The proxy's records.
            specs: The features, in order.
            classes: The labels, in the order of the logits.

        Raises:
            UserError: if a column is missing or of the wrong type.
        """
        return cls(features=tuple(_fit(spec, records) for spec in specs), classes=tuple(classes))

    @property
    def case_shape(self) -> tuple[int, ...]:
        """Shape of one encoded case: (D,) for tables, (1, L) for texts, (C, H, W) for images."""
        first = self.features[0]
        return first.shape if isinstance(first, WHOLE_CASES) else (len(self.encoded_names),)

    @property
    def encoded_names(self) -> tuple[str, ...]:
        """Names of the D encoded columns of a table; empty for images and texts."""
        return tuple(name for feature in self.features for name in feature.encoded_names)

    def encode(self, records: Records) -> Cases:
        """Encode records as the models see them.

        A label that is none of the classes counts as unlabelled, so that one slip of the pen at a hospital
        can't stop its site; `check_schema` names it.

        Raises:
            UserError: if the records lack a column or have one of another type; it quotes no record.
        """
        blocks = [feature.encode(_column(records, feature), self.limit) for feature in self.features]
        x = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)
        if x.shape[1:] != self.case_shape:
            raise UserError(f"the arrays have shape {x.shape[1:]} and the proxy's have {self.case_shape}")
        patients = records.patients
        return Cases(
            x=np.ascontiguousarray(x),
            y=self._class_numbers(records.target),
            patients=None
            if patients is None
            else np.unique(patients, return_inverse=True)[1].astype(np.int64),
            groups=records.groups,
        )

    def fits(self, x: Float32s) -> bool:
        """Whether cases that came from elsewhere hold only ids that there are, where they are texts."""
        first = self.features[0]
        return not isinstance(first, Text) or first.has_made(x)

    def _class_numbers(self, target: AnyArray) -> Ints:
        labels = np.asarray(target, dtype=str)
        numbers = np.full(len(labels), -1, dtype=np.int64)
        for number, name in enumerate(self.classes):
            numbers[labels == name] = number
        return numbers

    def to_json(self) -> str:
        """Return the canonical JSON text: the same constants give the same bytes."""
        tree = self.model_dump(mode="json", by_alias=False)
        return json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Preprocessing":
        """Read what `to_json` wrote.

        Raises:
            ValueError: for anything else.
        """
        return cls.model_validate_json(text, by_name=True)


def check_schema(records: Records, preprocessing: Preprocessing) -> list[str]:
    """Say what in these records doesn't fit the proxy's preprocessing, quoting no value of any record.

    Returns:
        One sentence a fault, in the order of the features; empty if all is well.
    """
    faults = (_complaint(records, feature, preprocessing.limit) for feature in preprocessing.features)
    complaints = [fault for fault in faults if fault]
    if len(records) == 0:
        complaints.append("there are no records")
    labels = np.asarray(records.target, dtype=str)
    if np.any(labels == ""):
        complaints.append("target: some records have no label")
    if not set(np.unique(labels).tolist()) <= {"", *preprocessing.classes}:
        complaints.append(f"target: some labels are none of the classes {', '.join(preprocessing.classes)}")
    if records.patients is not None and np.any(np.asarray(records.patients, dtype=str) == ""):
        complaints.append("patient: some records have no patient id")
    return complaints


def _complaint(records: Records, feature: Feature, limit: float) -> str:
    try:
        values = _column(records, feature)
    except UserError as error:
        return str(error)
    if len(values) == 0:
        return ""
    match feature:
        case Pixels():
            if values.shape[1:] != feature.shape:
                return f"{feature.name}: the arrays' shape is {values.shape[1:]}, the proxy's {feature.shape}"
        case Categorical():
            names = np.asarray(values, dtype=str)
            if np.any(~np.isin(names, [*feature.categories, ""])):
                known_names = ", ".join(feature.categories)
                return f"{feature.name}: some names are none of {known_names}; they count as missing"
        case Numeric():
            known = plausible(values, feature.low, feature.high)
            if outside := int(np.sum(np.isnan(known) & ~np.isnan(values))):
                low = "" if feature.low is None else f" below {feature.low:g}"
                high = "" if feature.high is None else f" above {feature.high:g}"
                where = " or".join(filter(None, (low, high)))
                return f"{feature.name}: {outside} values lie{where}, which can't be; they count as missing"
            z = _transformed(known[~np.isnan(known)], feature.transform, feature.floor) - feature.mean
            if len(z) and np.median(np.abs(z)) > limit * feature.scale / 2:
                return f"{feature.name}: most values are far from the proxy's; is the unit the same?"
    return ""


def _fit(spec: FeatureSpec, records: Records) -> Feature:
    values = _column(records, spec)
    match spec:
        case NumericSpec():
            return _fit_numeric(spec, values)
        case CategoricalSpec():
            names = tuple(np.unique(np.asarray(values, dtype=str)).tolist())
            categories = spec.categories or tuple(name for name in names if name)
            return Categorical(
                name=spec.name,
                categories=categories,
                reference=spec.reference,
                other_column=spec.other_column,
            )
        case Text():
            return spec
        case PixelsSpec():
            if values.dtype == np.uint8:  # bytes have a public range of their own
                mean, scale = 0.0, 255.0
            else:
                mean, scale = _mean_and_deviation(values[np.isfinite(values)].astype(np.float64))
            return Pixels(name=spec.name, shape=values.shape[1:], mean=mean, scale=scale)


def _fit_numeric(spec: NumericSpec, values: AnyArray) -> Numeric:
    known = plausible(values, spec.low, spec.high)
    known = known[np.isfinite(known)]
    positive = known[known > 0]
    floor = _rounded(float(positive.min()) / 2) if len(positive) else 1.0
    mean, deviation = _mean_and_deviation(_transformed(known, spec.transform, floor))
    return Numeric(
        name=spec.name,
        transform=spec.transform,
        floor=floor,
        low=spec.low,
        high=spec.high,
        mean=mean,
        scale=2 * deviation,
        below=_quantiles(known, spec.tails),
        above=_quantiles(known, [1 - tail for tail in spec.tails]),
        missing_flag=spec.missing_flag,
    )


def _quantiles(known: Floats, at: Sequence[float]) -> tuple[float, ...]:
    """Return distinct quantiles in rising order; two that coincide make one column."""
    if len(known) == 0:
        return ()
    return tuple(sorted({_rounded(float(quantile)) for quantile in np.quantile(known, at)}))


def _mean_and_deviation(values: Floats) -> tuple[float, float]:
    if len(values) == 0:
        return 0.0, 1.0
    return _rounded(float(values.mean())), _rounded(float(values.std())) or 1.0


def _rounded(value: float) -> float:
    """Six digits: readable, and the same on machines whose sums and logarithms differ in the last bit."""
    return float(f"{value:.6g}")


def plausible(values: Floats, low: float | None, high: float | None) -> Floats:
    """Turn what lies beyond the bounds of what can be into NaN, which is missing."""
    out = np.zeros(len(values), dtype=bool)
    if low is not None:
        out |= values < low
    if high is not None:
        out |= values > high
    return np.where(out, np.nan, values)


def _transformed(values: Floats, transform: Transform, floor: float) -> Floats:
    return np.log(np.maximum(values, floor)) if transform == "log" else values


_DTYPE_KINDS = {"numeric": "f", "categorical": "UO", "pixels": "fu", "text": "UO"}
"""NumPy's letters for what a kind of feature may be stored as."""


def _column(records: Records, feature: FeatureSpec | Feature) -> AnyArray:
    if feature.name not in records.columns:
        raise UserError(f"{feature.name}: there is no such column")
    values = records.columns[feature.name]
    if values.dtype.kind not in _DTYPE_KINDS[feature.kind]:
        raise UserError(f"{feature.name}: the column isn't {feature.kind}")
    return values
