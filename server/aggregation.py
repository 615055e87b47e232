"""The ensemble: how the sites' opinions become one.

A rule takes the contributions of one round, in the order of site names so that sums don't depend on who
answered first, and returns one `logits_PC`. Weights are declared public sizes or noisy label histograms
that were bought from the budget; true record counts never enter.

| rule | combines | withstands |
|---|---|---|
| `mean` | declared size by declared size | – |
| `class-weighted` | log-probabilities, each class by the noisy counts of that class | uneven labels |
| `trimmed-mean` | what is left of each value after cutting both ends | a few loud sites |
| `median` | the middle of each value | fewer than half, if loud |
| `geometric-median` | the point nearest to all | fewer than half, if loud |
| `stacking` | movements, by what validation labels say of each | loud and quiet ones (`server.stacking`) |
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from common.config import Aggregation
from server.robust_rules import geometric_median, median, trimmed_mean
from server.stacking import Jury, stacked

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Contribution:
    """What one site says in one round, admitted.

    Attributes:
        site: Its name.
        logits_PC: Its student's logits on the round's cases, or their movement.
        weight: Its declared public size.
        histogram_C: Its noisy label histogram, if one was bought.
    """

    site: str
    logits_PC: NDArray[np.float32]
    weight: float
    histogram_C: tuple[int, ...] = ()


LEAST_COUNT = 0.5
"""Noise may make a count negative; no weight is."""


@dataclass(frozen=True)
class Moment:
    """What a rule may look at besides the contributions.

    Attributes:
        settings: The run's.
        z_PC: The central state that movements start from; only `stacking` needs it.
        jury: The labelled validation cases; only `stacking` needs them.
    """

    settings: Aggregation
    z_PC: Floats | None = None
    jury: Jury | None = None


Rule = Callable[[Sequence[Contribution], Moment], Floats]


def aggregate(rule: str, contributions: Sequence[Contribution], moment: Moment) -> Floats:
    """Combine at least one contribution into `logits_PC`.

    Raises:
        ValueError: if there is nothing to combine.
    """
    if not contributions:
        raise ValueError("an ensemble needs at least one contribution")
    return RULES[rule](sorted(contributions, key=lambda one: one.site), moment)


def mean(contributions: Sequence[Contribution], moment: Moment) -> Floats:
    """Mean weighted by declared sizes, accumulated in place."""
    del moment
    total_PC = np.zeros(contributions[0].logits_PC.shape)
    for one in contributions:
        total_PC += one.weight * one.logits_PC
    return total_PC / sum(one.weight for one in contributions)


def class_weighted(contributions: Sequence[Contribution], moment: Moment) -> Floats:
    """Σ over sites of w_kc · log p_kc, where w_kc is site k's share of all noisy counts of class c.

    A site that has seen most cases of a class has most say about it; one whose histogram never came counts as
    having seen none. Sharpened by `aggregation.temperature`.
    """
    cases, classes = contributions[0].logits_PC.shape
    total_PC, unseen_C = np.zeros((cases, classes)), (0,) * classes
    counts_KC = np.maximum([one.histogram_C or unseen_C for one in contributions], LEAST_COUNT)
    # Who claims more cases than the size it declared gets no more say than that size.
    weight_K1 = np.array([[one.weight] for one in contributions])
    counts_KC = counts_KC * np.minimum(1.0, weight_K1 / counts_KC.sum(axis=1, keepdims=True))
    share_KC = counts_KC / counts_KC.sum(axis=0)
    for one, share_C in zip(contributions, share_KC, strict=True):
        total_PC += share_C * log_softmax(one.logits_PC.astype(np.float64), axis=1)
    return total_PC / moment.settings.temperature


def _stacking(contributions: Sequence[Contribution], moment: Moment) -> Floats:
    if moment.jury is None or moment.z_PC is None:
        raise ValueError("stacking needs a jury and the state that movements start from")
    return stacked(_logits(contributions), _weights(contributions), moment.jury, moment.z_PC)[0]


def _logits(contributions: Sequence[Contribution]) -> list[NDArray[np.float32]]:
    return [one.logits_PC for one in contributions]


def _weights(contributions: Sequence[Contribution]) -> Floats:
    return np.array([one.weight for one in contributions])


RULES: dict[str, Rule] = {
    "mean": mean,
    "class-weighted": class_weighted,
    "trimmed-mean": lambda said, moment: trimmed_mean(_logits(said), _weights(said), moment.settings.trim),
    "median": lambda said, moment: median(_logits(said), _weights(said)),
    "geometric-median": lambda said, moment: geometric_median(_logits(said), _weights(said)),
    "stacking": _stacking,
}
