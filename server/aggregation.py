"""The ensemble: how the sites' opinions become one.

An ensemble hears the contributions of one round as they come, in any order, and then combines them into one
`logits_PC`, the same to the bit whatever the order was. Weights are declared public sizes (`server.weights`)
or noisy label histograms that were bought from the budget; true record counts never enter.

| rule | combines | withstands | holds |
|---|---|---|---|
| `mean` | weight by weight | – | one sum |
| `class-weighted` | log-probabilities, each class by its noisy counts | uneven labels | one sum |
| `trimmed-mean` | what is left of each value after cutting both ends | a few loud sites | every release |
| `median` | the middle of each value | fewer than half, if loud | every release |
| `geometric-median` | the point nearest to all | fewer than half, if loud | every release |
| `outlier-weights` | weight by weight, less what outliers have lost | the same | every release |
| `stacking` | movements, by what validation labels say | loud and quiet ones | every release |

The first two are streams: a release is folded into a sum and let go of, so memory doesn't grow with the
number of sites. Sums are exact (`OrderFreeSum`), so that they don't depend on who answered first.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from common.config import Aggregation
from server.robust_rules import geometric_median, median, outlier_scores, trimmed_mean
from server.stacking import Jury, stacked

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Contribution:
    """What one site says in one round, admitted.

    Attributes:
        site: Its name.
        logits_PC: Its student's logits on the round's cases, or their movement.
        weight: Its declared public size, or what `server.weights` makes of it.
        histogram_C: Its noisy label histogram, if one was bought.
    """

    site: str
    logits_PC: NDArray[np.float32]
    weight: float
    histogram_C: tuple[int, ...] = ()


@dataclass(frozen=True)
class Moment:
    """What a rule may look at besides the contributions.

    Attributes:
        settings: The run's.
        total_weight: Of all sites that may contribute: no weight in the round is above it.
        z_PC: The central state that movements start from; only `stacking` needs it.
        jury: The labelled validation cases; only `stacking` needs them.
        outlying: Sum of each site's outlier scores in the rounds before; only `outlier-weights` needs it.
    """

    settings: Aggregation
    total_weight: float
    z_PC: Floats | None = None
    jury: Jury | None = None
    outlying: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Combined:
    """What a round comes to.

    Attributes:
        logits_PC: The ensemble.
        outlying: Sum of outlier scores, this round's among them, of every site that was heard, if the rule
            keeps any.
    """

    logits_PC: Floats
    outlying: Mapping[str, float] = field(default_factory=dict)


class Ensemble(Protocol):
    """A rule at work on one round."""

    def hear(self, one: Contribution) -> None:
        """Take one contribution; each site is heard at most once."""

    def combined(self) -> Combined:
        """What was heard as one.

        Raises:
            ValueError: if nothing was heard.
        """


def open_ensemble(rule: str, moment: Moment) -> Ensemble:
    """Begin a round under a rule."""
    return RULES[rule](moment)


def aggregate(rule: str, contributions: Iterable[Contribution], moment: Moment) -> Combined:
    """Combine contributions that are all there."""
    ensemble = open_ensemble(rule, moment)
    for one in contributions:
        ensemble.hear(one)
    return ensemble.combined()


GRID = 2.0**-32
LARGEST = 2.0**18
_OFFSET = 1.5 * 2.0**52 * GRID
"""Float64 numbers within 2¹⁹ of it are multiples of `GRID`; one n steps away has its own bits plus n."""
_OFFSET_BITS = int(np.float64(_OFFSET).view(np.uint64))


class OrderFreeSum:
    """Σ of arrays whose result doesn't depend on the order of the terms.

    Each term is rounded to multiples of 2⁻³² (an error of at most 1.2·10⁻¹⁰ beside the product's own), which
    are added as integers.
    Rounding to a common grid is the first step of reproducible summation (Demmel and Nguyen 2013,
    doi:10.1109/ARITH.2013.9). The rounding is done by adding `_OFFSET`, and the integers are read off the
    bits of what comes of it.
    """

    def __init__(self) -> None:
        """Begin at nothing."""
        self._bits: NDArray[np.uint64] | None = None
        self._term: Floats | None = None
        self._terms = 0

    def add(self, factor: float | Floats, values: NDArray[np.floating]) -> None:
        """Add factor · values (cut to ±2¹⁸). The factors of all terms add up to at most 1.

        Raises:
            ValueError: if a value is no number.
        """
        if self._bits is None:
            self._bits, self._term = np.zeros(values.shape, np.uint64), np.empty(values.shape)
        assert self._term is not None
        flat = values.reshape(-1)
        if not flat @ flat < LARGEST**2:  # one fast pass; most often no value can be too large
            if np.isnan(flat).any():
                raise ValueError("a sum of what is no number")
            values = np.clip(values, -LARGEST, LARGEST)
        np.copyto(self._term, values)  # before the product, which would be float32 otherwise, and slower
        self._term *= factor
        self._term += _OFFSET
        self._bits += self._term.view(np.uint64)
        self._terms += 1

    @property
    def total(self) -> Floats:
        """The sum so far; raises `ValueError` if there is none."""
        if self._bits is None:
            raise ValueError("an ensemble needs at least one contribution")
        steps = self._bits - np.uint64(self._terms * _OFFSET_BITS % 2**64)  # integers modulo 2⁶⁴
        total: Floats = steps.view(np.int64) * np.float64(GRID)
        return total


class Mean:
    """Weighted mean, a stream."""

    def __init__(self, moment: Moment) -> None:
        """Begin with nobody."""
        self._whole = moment.total_weight
        self._sum, self._weights = OrderFreeSum(), list[float]()

    def hear(self, one: Contribution) -> None:
        """Fold one contribution into the sum."""
        self._sum.add(one.weight / self._whole, one.logits_PC)
        self._weights.append(one.weight)

    def combined(self) -> Combined:
        """The mean over those that were heard."""
        total_PC = self._sum.total
        return Combined(total_PC * (self._whole / math.fsum(self._weights)))


LEAST_COUNT = 0.5
"""Noise may make a count negative; no weight is."""


class ClassWeighted:
    """Σ over sites of w_kc · log p_kc, where w_kc is site k's share of all noisy counts of class c; a stream.

    A site that has seen most cases of a class has most say about it; one whose histogram never came counts as
    having seen none. Sharpened by `aggregation.temperature`.
    """

    def __init__(self, moment: Moment) -> None:
        """Begin with nobody."""
        self._moment = moment
        self._sum = OrderFreeSum()
        self._counts_KC = list[Floats]()  # C numbers a site

    def hear(self, one: Contribution) -> None:
        """Fold one contribution into the sum."""
        unseen_C = (0,) * one.logits_PC.shape[1]
        counts_C = np.maximum(one.histogram_C or unseen_C, LEAST_COUNT)
        # Who claims more cases than the size it declared gets no more say than that size.
        counts_C = counts_C * min(1.0, one.weight / counts_C.sum())
        log_p_PC = log_softmax(one.logits_PC.astype(np.float64), axis=1)
        self._sum.add(counts_C / self._moment.total_weight, log_p_PC)
        self._counts_KC.append(counts_C)

    def combined(self) -> Combined:
        """Weighted log-probabilities, sharpened."""
        total_PC = self._sum.total * self._moment.total_weight
        seen_C = np.array([math.fsum(counts_K) for counts_K in zip(*self._counts_KC, strict=True)])
        return Combined(total_PC / seen_C / self._moment.settings.temperature)


class Held:
    """Rules that need every contribution at once, in the order of site names."""

    def __init__(self, rule: "Rule", moment: Moment) -> None:
        """Begin with nobody."""
        self._rule, self._moment = rule, moment
        self._said: list[Contribution] = []

    def hear(self, one: Contribution) -> None:
        """Keep one contribution."""
        self._said.append(one)

    def combined(self) -> Combined:
        """What the rule makes of all."""
        if not self._said:
            raise ValueError("an ensemble needs at least one contribution")
        return self._rule(sorted(self._said, key=lambda one: one.site), self._moment)


Rule = Callable[[Sequence[Contribution], Moment], Combined]
"""From every site's contribution to the ensemble."""
ByValues = Callable[[Sequence[NDArray[np.float32]], Floats, Moment], Floats]
"""The same for a rule that needs nothing but every site's `logits_PC` and weight."""


def _outlier_weights(said: Sequence[Contribution], moment: Moment) -> Combined:
    logits_KPC, weight_K = _values(said)
    past_K = np.array([moment.outlying.get(one.site, 0.0) for one in said])
    outlying_K = past_K + outlier_scores(logits_KPC, weight_K)
    # Weights count against each other only, so the least score may be taken off all: no sum of them vanishes.
    weight_K = weight_K * np.exp(outlying_K.min() - outlying_K)
    mean = Mean(replace(moment, total_weight=math.fsum(weight_K)))
    for one, weight in zip(said, weight_K, strict=True):
        mean.hear(replace(one, weight=float(weight)))
    scores = {one.site: float(score) for one, score in zip(said, outlying_K, strict=True)}
    return replace(mean.combined(), outlying=scores)


def _stacking(movement_KPC: Sequence[NDArray[np.float32]], weight_K: Floats, moment: Moment) -> Floats:
    if moment.jury is None or moment.z_PC is None:
        raise ValueError("stacking needs a jury and the state that movements start from")
    return stacked(movement_KPC, weight_K, moment.jury, moment.z_PC)[0]


def _values(said: Sequence[Contribution]) -> tuple[list[NDArray[np.float32]], Floats]:
    return [one.logits_PC for one in said], np.array([one.weight for one in said])


def _held(rule: Rule) -> Callable[[Moment], Ensemble]:
    return lambda moment: Held(rule, moment)


def _by_values(rule: ByValues) -> Callable[[Moment], Ensemble]:
    return _held(lambda said, moment: Combined(rule(*_values(said), moment)))


RULES: dict[str, Callable[[Moment], Ensemble]] = {
    "mean": Mean,
    "class-weighted": ClassWeighted,
    "trimmed-mean": _by_values(
        lambda said, weight_K, moment: trimmed_mean(said, weight_K, moment.settings.trim)
    ),
    "median": _by_values(lambda said, weight_K, moment: median(said, weight_K)),
    "geometric-median": _by_values(lambda said, weight_K, moment: geometric_median(said, weight_K)),
    "outlier-weights": _held(_outlier_weights),
    "stacking": _by_values(_stacking),
}
